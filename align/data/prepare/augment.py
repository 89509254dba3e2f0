"""Further rows made from those of the train side: pairs turned round, and prompts said otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from align.config_data import AugmentSection
from align.data.names import Kind
from reward.records import InputError, Message, Record, prompt_id


def augmented(records: Iterable[Record], kind: Kind, section: AugmentSection, seed: int) -> Iterator[Record]:
    """The further records only, each with `augmented` ("swap", "paraphrase 2") and `augmented_from`, a `prompt_id`.

    swap: every preference once more, with `chosen_index` turned round, as if the annotator had seen the answers in the
    other order. paraphrase: the last user turn in one of the templates, numbered from 1. Which prompts are paraphrased,
    and by which template, is drawn by a hash of the seed and the prompt, so that the rows of a prompt stay together.

    Only rows whose `split` is "train" are augmented, and what is made of them says "train" too. No test prompt can come
    of it: the side is a property that a record carries and is not drawn again from the hash of the new prompt, and a
    paraphrase that is by chance the prompt of any row here, of either side, is left out.

    Args:
        records: all of a file, of both sides; read once. Swapped pairs come as they are read, paraphrases at the end,
            since only then all prompts are known: an id a prompt and the drawn share of the rows are held until then.

    Raises:
        InputError: pairs are to be turned round, and a pair does not say in which order its answers were seen.
    """
    known: set[int] = set()
    drawn: list[tuple[Record, int]] = []
    for record in records:
        name = prompt_id(record["prompt"])
        known.add(int(name, 16))
        if record.get("split") != "train":
            continue
        if section.swap and kind == "preference":
            yield {**record, "chosen_index": 1 - _order_of(record), "augmented": "swap", "augmented_from": name}
        if (number := _template_of(name, section, seed)) is not None:
            drawn.append((record, number))
    for record, number in drawn:
        made = _paraphrase(record, section.templates[number], number + 1)
        if made is not None and int(prompt_id(made["prompt"]), 16) not in known:
            yield made


def _order_of(record: Record) -> int:
    index = record.get("chosen_index")
    if isinstance(index, bool) or index not in (0, 1):
        raise InputError(
            "prepare.augment.swap turns round in which order the answers of a pair were seen, but a pair has "
            f"chosen_index {index!r}, where 0 (the chosen answer came first) or 1 is wanted: add the column, or leave "
            "swap out."
        )
    return int(index)


def _template_of(name: str, section: AugmentSection, seed: int) -> int | None:
    """The index of the template that a prompt is drawn for; None for most prompts."""
    if not section.templates:
        return None
    drawn = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()
    if int.from_bytes(drawn[:8]) >= section.share * 2**64:
        return None
    return int.from_bytes(drawn[8:]) % len(section.templates)


def _paraphrase(record: Record, template: str, number: int) -> Record | None:
    """The record with its last user turn in the template; None where no user speaks."""
    prompt: list[Message] = record["prompt"]
    last = max((place for place, turn in enumerate(prompt) if turn["role"] == "user"), default=None)
    if last is None:
        return None
    said = template.replace("{prompt}", prompt[last]["content"])
    made: Record = {**record, "prompt": [*prompt[:last], {**prompt[last], "content": said}, *prompt[last + 1 :]]}
    if "id" in record:  # names one record only
        made["id"] = f"{record['id']}-paraphrase-{number}"
    return {**made, "augmented": f"paraphrase {number}", "augmented_from": prompt_id(prompt)}
