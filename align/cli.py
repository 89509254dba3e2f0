"""The command line: a table of contents.

Exit codes: 0 done; 2 the user's input is wrong (one clear sentence on stderr, no traceback); 1 our fault.
Imports are late on purpose: `align --help` must not pay for torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="From demonstrations to a verdict: sft, sample, label, reward, dpo, ppo, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the pipeline.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as dpo.beta=0.2.")
]
Force = Annotated[bool, typer.Option("--force", help="Redo a stage whose folder was made from other inputs.")]


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    force: Force = False,
    accelerate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Start training stages under accelerate launch.")
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

    try:
        pipeline.run_stage(load_config(config, overrides or []), name, force=force)
    finally:
        ranks.leave()


def main() -> None:
    """The `align` command: run it and turn what went wrong into an exit code."""
    from reward.records import InputError

    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer turns Ctrl-C into a returned exit code
            _complain("stopped; the same command goes on from the last checkpoint.")
        if code:
            sys.exit(code)
        return
    except InputError as error:
        _complain(str(error))
    except Exception as error:
        from align.runs import is_disk_full

        if is_disk_full(error):
            _complain("the disk is full: make room and run the same command again; it goes on where it stopped.")
        elif hasattr(error, "format_message"):  # click's own: a missing argument, an unknown option
            if not sys.argv[1:]:
                print(error.format_message(), file=sys.stderr)  # `align` alone: the table of contents
            else:
                _complain(f"{error.format_message().rstrip('.')}. See `align --help`.")
        else:
            raise
    sys.exit(2)


def _complain(sentence: str) -> None:
    import os

    if int(os.environ.get("RANK", "0")) == 0:
        print(f"align: {sentence}", file=sys.stderr)
