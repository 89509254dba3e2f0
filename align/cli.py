"""The command line: a table of contents.

Exit codes: 0 done; 2 the user's input is wrong (one clear sentence on stderr, no traceback); 130 Ctrl-C; 143 SIGTERM;
1 our fault.
Imports are late on purpose: `align --help` must not pay for torch.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from align.data.cli import app as data_app

if TYPE_CHECKING:
    from align.config import Config

app = typer.Typer(
    help="From demonstrations to a verdict: sft, sample, label, reward, dpo, ppo, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(data_app, name="data")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the pipeline.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as dpo.beta=0.2.")
]
Force = Annotated[bool, typer.Option("--force", help="Redo a stage whose folder was made from other inputs.")]

_GOES_ON = "the same command goes on from the last checkpoint."


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    force: Force = False,
    accelerate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Start all stages but label under accelerate launch.")
    ] = None,
) -> None:
    """Run all stages in order, skipping what is done."""
    from align import pipeline
    from align.config_file import load_config

    pipeline.run_pipeline(load_config(config, overrides or []), force=force, accelerate=accelerate)


@app.command()
def sft(config: ConfigFile, overrides: Overrides = None, force: Force = False) -> None:
    """Stage 1: fine-tune the base on demonstrations."""
    _stage("sft", config, overrides, force)


@app.command()
def sample(config: ConfigFile, overrides: Overrides = None, force: Force = False) -> None:
    """Stage 2: sample several answers to every prompt."""
    _stage("sample", config, overrides, force)


@app.command()
def label(
    config: ConfigFile,
    overrides: Overrides = None,
    force: Force = False,
    local: Annotated[
        bool, typer.Option("--local", help="The app for one person on this machine, without a password.")
    ] = False,
    invite: Annotated[
        str | None, typer.Option(metavar="ROLE", help="Print a link that lets one person join, and end.")
    ] = None,
    bring: Annotated[
        Path | None,
        typer.Option("--import", metavar="FILE", help="Add a file's comparisons to what people label, and end."),
    ] = None,
) -> None:
    """Stage 3: turn comparisons, or an existing dataset, into preferences; or serve the app where people label."""
    overrides = [*(overrides or []), *(["label.source=people", "label.app.local=true"] if local else [])]
    if invite is not None:
        from align.config_file import load_config
        from align.label import invitation

        typer.echo(invitation(load_config(config, overrides), invite))
        return
    if bring is not None:
        from align.config_file import load_config
        from align.label import import_file

        typer.echo(import_file(load_config(config, [*overrides, "label.source=people"]), bring))
        return
    _stage("label", config, overrides, force)


@app.command()
def reward(config: ConfigFile, overrides: Overrides = None, force: Force = False) -> None:
    """Stage 4: train the reward model on the preferences."""
    _stage("reward", config, overrides, force)


@app.command()
def dpo(config: ConfigFile, overrides: Overrides = None, force: Force = False) -> None:
    """Stage 5: align the policy on the preferences with DPO."""
    _stage("dpo", config, overrides, force)


@app.command()
def ppo(config: ConfigFile, overrides: Overrides = None, force: Force = False) -> None:
    """Stage 6: align the policy against the reward model with PPO."""
    _stage("ppo", config, overrides, force)


@app.command()
def compare(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG|MODEL", help="YAML file of the pipeline, or the model to beat.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL|KEY=VALUE]...",
            help="Models compared with it (folder, hub id or JSONL of answers), and overrides: data.prompts=FILE.",
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Stage 7: compare the models on held-out prompts and write the report; or any models, on any prompts."""
    if config.endswith((".yaml", ".yml")):
        _stage("compare", Path(config), overrides, force)
        return
    from align import pipeline
    from align.compare.places import free_comparison

    pipeline.run_stage(free_comparison([config, *(overrides or [])]), "compare", force=force)


@app.command()
def score(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A reward stage's folder, a reward model's, or a hub id.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL of prompts with answers.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write; without it, standard output.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers a forward pass.")] = 16,
) -> None:
    """Score answers with a reward model: JSONL in, JSONL with rewards out."""
    from align.score import score_file

    score_file(run, file, out, batch_size)


@app.command()
def chat(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A stage's folder, a model's, or a hub id.")],
    other: Annotated[str | None, typer.Argument(metavar="[RUN2]", help="A second one; without it, RUN's base.")] = None,
    blind: Annotated[bool, typer.Option("--blind", help="Hide the names until the vote.")] = False,
    store: Annotated[str | None, typer.Option(metavar="FILE|URL", help="The label database of the votes.")] = None,
    host: Annotated[str, typer.Option(help="127.0.0.1 or localhost.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8766,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same messages get the same answers.")] = None,
) -> None:
    """Talk to one or two models in the browser, blind on request; votes go to the label database."""
    from align import chat

    chat.chat(
        run,
        other,
        blind=blind,
        store=store,
        host=host,
        port=port,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )


@app.command()
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Say what is wrong with the data of every stage, before anything is trained."""
    from align.check import command
    from align.config_file import load_config

    command.check(load_config(config, overrides or []), typer.echo)


@app.command()
def inspect(
    config: ConfigFile,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(metavar="STAGE", help="Which stage; without it, the first.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, metavar="N", help="Rows shown.")] = 3,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page instead.")] = None,
) -> None:
    """Show rows of a stage token by token, and which tokens are trained."""
    from align.config_file import load_config
    from align.inspect import command

    command.inspect(load_config(config, overrides or []), stage, n, html, typer.echo)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(metavar="N", help="GPUs; without it, this machine's CPU.")] = 0,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="Which GPU, such as a100, h100, l4.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Of each GPU: 80GB, 24GiB.")] = None,
    tflops: Annotated[float | None, typer.Option(metavar="X", help="TFLOP/s that a step reaches, if known.")] = None,
) -> None:
    """Say what every stage will take, before anything is loaded: memory, time, batch sizes, launcher."""
    from align.config_file import load_config
    from align.pipeline import after_prepare
    from align.plan import planning, report
    from align.training import calm_libraries

    machine = planning.machine_of(gpus, gpu, gpu_memory, tflops)
    with calm_libraries():
        planned = planning.plan(after_prepare(load_config(config, overrides or [])), machine)
    typer.echo(report.as_text(planned))


@app.command()
def lineage(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Print the chain from a model back to its labels and data, with digests."""
    from align import lineage

    typer.echo(lineage.as_text(run))


@app.command()
def schema() -> None:
    """Print the JSON schema of a config file, for editors."""
    import json

    from align.config_file import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def _stage(name: str, config: Path, overrides: list[str] | None, force: bool) -> None:
    from align import pipeline, ranks
    from align.config_file import load_config

    def load() -> Config:
        loaded = load_config(config, overrides or [])
        ranks.start(pipeline.patience(loaded, name))
        return loaded

    try:
        pipeline.run_stage(ranks.together(load), name, force=force)
    except BaseException:
        ranks.speaks()  # settled before the others notice that this one leaves
        raise
    finally:
        ranks.leave()


def main() -> None:
    """The `align` command: run it and turn what went wrong into an exit code."""
    from align import ranks, stopping
    from reward.records import InputError

    stopping.listen()
    # As it is imported (by peft, before any stage begins), it tells everybody of a kernel that only 4-bit bases use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        code = app(standalone_mode=False)
    except InputError as error:
        _end(2, str(error))
    except stopping.Terminated:
        if ranks.speaks() and (missing := ranks.said_of_missing()):  # then it was the launcher that ended the others
            _end(1, f"{missing}; {_GOES_ON}")
        _end(stopping.EXIT_CODE, f"stopped by SIGTERM; {_GOES_ON}")
    except Exception as error:
        from align.runs import is_disk_full

        if is_disk_full(error):
            _end(2, "the disk is full: make room and run the same command again; it goes on where it stopped.")
        elif ranks.lost_another(error):
            said = ranks.said_of_missing() or "another process of this launch has ended or does not answer"
            _end(1, f"{said}; {_GOES_ON}")
        elif hasattr(error, "format_message"):  # click's own: a missing argument, an unknown option
            if not sys.argv[1:]:
                print(error.format_message(), file=sys.stderr)  # `align` alone: the table of contents
                sys.exit(2)
            said = " ".join(error.format_message().split())  # click lists choices on lines of their own
            _end(2, f"{said.rstrip('.')}. See `align --help`.")
        raise
    if code == 130:  # typer turns Ctrl-C into a returned exit code
        _end(130, f"stopped; {_GOES_ON}")
    if code:
        sys.exit(code)


def _end(code: int, sentence: str) -> NoReturn:
    """Say why, once over all processes of a launch, and end."""
    import os

    from align import ranks

    if ranks.speaks():
        print(f"align: {sentence}", file=sys.stderr, flush=True)
        if "ALIGN_EXIT_CODE" in os.environ:  # `align run --accelerate` reads it: the launcher's own code is mostly 1
            Path(os.environ["ALIGN_EXIT_CODE"]).write_text(str(code))
    sys.exit(code)
