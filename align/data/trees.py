"""OpenAssistant's trees of messages: every prompt with several answers, ranked by people, is a comparison.

Two layouts are public: a tree a row, `{message_tree_id, prompt: {message_id, text, role, replies: [...]}}`, and a
message a row, `{message_id, parent_id, text, role, rank, message_tree_id, ...}`, where the rows of a tree follow one
another. Roles are prompter and assistant; rank 0 is the best of its siblings; messages marked `deleted` are no part of
a tree, nor is what hangs on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from align.data.turns import CannotHold, check_measures, column_of, short, text_of
from reward.records import InputError, Message, Record

_ROLES = {"prompter": "user", "assistant": "assistant"}


def grown(rows: Iterator[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
    """Rows of messages as rows of trees, `{message_tree_id, prompt: {..., replies}}`, each placed where it begins.

    Raises:
        InputError: a parent is missing, messages are each other's parents, an id is there twice, or the rows of a tree
            stand apart.
    """
    seen: set[str] = set()
    for tree, group in groupby(rows, key=lambda placed: str(column_of(placed[1], "message_tree_id", placed[0]))):
        members = list(group)
        if tree in seen:
            raise InputError(
                f"{members[0][0]}: the rows of tree {tree} stand apart: sort the file by message_tree_id first."
            )
        seen.add(tree)
        yield members[0][0], {"message_tree_id": tree, "prompt": _tree(members)}


def _tree(members: list[tuple[str, Record]]) -> Record:
    nodes: dict[str, Record] = {}
    for where, row in members:
        name = text_of(row, "message_id", where)
        if name in nodes:
            raise InputError(f"{where}: the message {name} is there twice: keep one of them.")
        nodes[name] = {**row, "replies": []}
    roots = []
    for where, row in members:
        node, parent = nodes[row["message_id"]], row.get("parent_id")
        if parent is None:
            roots.append(node)
        elif isinstance(parent, str) and parent in nodes:
            nodes[parent]["replies"].append(node)
        else:
            raise InputError(
                f"{where}: the parent {parent} of message {row['message_id']} is missing: give whole trees."
            )
    if len(roots) > 1:
        raise InputError(f"{members[0][0]}: the tree has {len(roots)} messages without a parent: it has one root.")
    reached = sum(1 for root in roots for _ in _walk(root))
    if reached != len(nodes):
        raise InputError(f"{members[0][0]}: the tree goes in a circle: some messages are each other's parents.")
    return roots[0]


def _walk(root: Record) -> Iterator[Record]:
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node["replies"])


def comparisons(row: Record, where: str) -> list[Record]:
    """`{id, prompt, answers: [{text, rank?, message_id}]}` for every prompt of a tree that has an answer.

    Raises:
        InputError: a message has no text, an unknown role, or a parent other than the one it hangs on.
        CannotHold: no prompt of the tree has an answer.
    """
    found: list[Record] = []
    names: set[str] = set()
    tree = row.get("message_tree_id")
    root = column_of(row, "prompt", where)
    waiting: list[tuple[Any, list[Message], Any]] = [(root, [], None)]
    while waiting:
        node, before, parent = waiting.pop()
        message = _message(node, where, parent, names)
        if node.get("deleted"):
            continue
        path = [*before, message]
        replies = node.get("replies") or []
        waiting.extend((reply, path, node.get("message_id")) for reply in reversed(replies))
        answers = [_answer(reply) for reply in replies if isinstance(reply, dict) and not reply.get("deleted")]
        check_measures(answers, where)
        if message["role"] == "user" and answers:
            number = node.get("message_id") or f"{tree}-{len(found)}"
            found.append({"id": str(number), "prompt": path, "answers": answers, "tree_id": tree})
    if not found:
        raise CannotHold("(trees) in which no prompt has an answer")
    return found


def _message(node: Any, where: str, parent: Any, names: set[str]) -> Message:
    if not isinstance(node, dict):
        raise InputError(f"{where}: a message of a tree is {short(node)}, but an object with text and role is wanted.")
    name = node.get("message_id")
    if str(name) in names:
        raise InputError(f"{where}: the message {name} is in the tree twice: a tree has no circles.")
    names |= {str(name)} - {"None"}
    if parent is not None and node.get("parent_id") not in (None, parent):
        raise InputError(f"{where}: message {name} hangs on {parent}, but its parent_id is {node['parent_id']}.")
    role = node.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(f"{where}: role {role!r} is unknown; the roles of a tree are {', '.join(_ROLES)}.")
    if not isinstance(node.get("replies") or [], list):
        raise InputError(f"{where}: the replies of message {name} are {short(node['replies'])}, but a list is wanted.")
    return {"role": _ROLES[role], "content": text_of(node, "text", where)}


def _answer(reply: Record) -> Record:
    kept = {"text": reply.get("text"), "rank": reply.get("rank"), "message_id": reply.get("message_id")}
    return {name: value for name, value in kept.items() if value is not None}
