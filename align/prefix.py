"""The shared-prefix forward: tokens that rows begin with alike are computed once, and padding not at all.

A preference batch holds every prompt twice, a ranking K times, and a chat template begins all rows alike. Below a
decoder `share_prefixes` lays the rows of a batch out as one sequence in which every distinct beginning stands once,

    [ prompt 1 | chosen 1 | rejected 1 | prompt 2 | chosen 2 | ... ]

and only attention knows where each token came from: it gathers, for each row, the keys of its whole beginning and the
queries of the tokens that are its own. A token's hidden state depends on what precedes it alone, so it is the one it
would have had in a row of its own; the caller gets it back in the batch's own shape, and the losses, heads and trainers
above know nothing of it. (The idea of the tree: arXiv 2410.20305. There attention is masked over the whole sequence;
gathered, its cost does not grow with the number of rows laid side by side.)

Shapes: B rows of S columns as the caller has them; P places in the one sequence; H hidden size. In attention: G rows,
Q queries and K keys a row.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from align import ranks
from align.logprobs import base_model

# The packed forward is left out where more than this share of the padded tokens would remain: gathering costs a little.
WORTH = 0.96
_NAME = "shared_prefix|{}"
_LAYOUT = "prefix_layout"  # the keyword under which a layout travels through the decoder to its attention


@dataclass
class _Rows:
    """Rows whose attention is computed together.

    query_GQ, key_GK: places of the tokens that are a row's own, and of all its tokens from the first; 0 for padding.
    first_G: the position, in its row, of its first query.
    """

    query_GQ: Tensor
    key_GK: Tensor
    first_G: Tensor
    whole: bool  # nothing of these rows is shared: queries and keys are the same tokens
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """G1QK, True where the query sees the key; `window`: of how many positions, its own included."""
        if window not in self.masks:
            device = self.key_GK.device
            query_GQ1 = (self.first_G[:, None] + torch.arange(self.query_GQ.shape[1], device=device))[:, :, None]
            key_K = torch.arange(self.key_GK.shape[1], device=device)
            sees_GQK = key_K <= query_GQ1
            if window is not None:
                sees_GQK &= key_K > query_GQ1 - window
            self.masks[window] = sees_GQK[:, None]
        return self.masks[window]


@dataclass
class Layout:
    """A batch as one sequence.

    ids_P, position_P: its tokens, and where each stands in the rows it comes from.
    place_BS: where the caller's token lies; 0 for padding.
    answer_P: where the place's token lies among the outputs of attention, all rows of all groups after one another.
    """

    ids_P: Tensor
    position_P: Tensor
    place_BS: Tensor
    groups: list[_Rows]
    answer_P: Tensor
    windows: list[int | None] = field(default_factory=list)  # what the layers asked for, layer by layer

    def attend(self, attention: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, window: Any) -> Tensor:
        """Attention output (1, P, heads, size) from queries, keys and values (1, heads, P, size).

        Args:
            attention: `(query, key, value, mask or None)` of rows, to an output (rows, Q, heads, size); None stands for
                the plain causal mask.
        """
        self.windows.append(window)
        query_PHD, key_PHD, value_PHD = (x[0].transpose(0, 1) for x in (query, key, value))
        outputs = []
        for rows in self.groups:
            query_GHQD, key_GHKD, value_GHKD = (
                _gather(x_PHD, place).transpose(1, 2)
                for x_PHD, place in ((query_PHD, rows.query_GQ), (key_PHD, rows.key_GK), (value_PHD, rows.key_GK))
            )
            plain = rows.whole and (window is None or window >= rows.key_GK.shape[1])
            output_GQHD = attention(query_GHQD, key_GHKD, value_GHKD, None if plain else rows.mask(window))
            outputs.append(output_GQHD.flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.answer_P)[None]


def _gather(values_P: Tensor, place: Tensor) -> Tensor:
    """`values_P[place]`; its gradient is summed place by place, which indexing by two dimensions does far slower."""
    return values_P.index_select(0, place.flatten()).unflatten(0, place.shape)


def lay_out(rows: Sequence[Any], starts: Sequence[int], columns: int, device: Any = "cpu") -> Layout:
    """The layout of rows of tokens; the caller's row b begins at column `starts[b]` of `columns`.

    Rows are laid out in lexicographic order, so that each shares with the one before it whatever it shares with any.
    """
    tokens = [np.asarray(row, dtype=np.int64) for row in rows]
    own_tokens, positions = [], []
    place_BS = np.zeros((len(rows), columns), dtype=np.int64)
    members: list[_Member] = []
    count, path, previous = 0, np.empty(0, np.int64), np.empty(0, np.int64)
    for index in _in_order(tokens):
        row = tokens[index]
        shared = _common(previous, row)
        path = np.concatenate([path[:shared], np.arange(count, count + len(row) - shared)])
        count += len(row) - shared
        own_tokens.append(row[shared:])
        positions.append(np.arange(shared, len(row)))
        place_BS[index, starts[index] : starts[index] + len(row)] = path
        if shared < len(row):
            members.append(_Member(shared, path))
        previous = row
    answer_P = np.empty(count, dtype=np.int64)
    groups, filled = [], 0
    for part in _alike(members):
        queries, keys = max(m.own for m in part), max(len(m.path) for m in part)
        query_GQ, key_GK = (np.zeros((len(part), size), dtype=np.int64) for size in (queries, keys))
        for g, member in enumerate(part):
            own = member.path[member.shared :]
            query_GQ[g, : member.own], key_GK[g, : len(member.path)] = own, member.path
            answer_P[own] = filled + g * queries + np.arange(member.own)
        filled += query_GQ.size
        first_G = np.array([member.shared for member in part])
        query, key, first = (torch.from_numpy(x).to(device) for x in (query_GQ, key_GK, first_G))
        groups.append(_Rows(query, key, first, whole=not first_G.any()))
    laid_out = (np.concatenate(own_tokens), np.concatenate(positions), place_BS, answer_P)
    ids_P, position_P, place, answer = (torch.from_numpy(x).to(device) for x in laid_out)
    return Layout(ids_P, position_P, place, groups, answer)


class _Member(NamedTuple):
    """A row in the sequence: how many of its tokens are another's, and the places of all of them."""

    shared: int
    path: Any

    @property
    def own(self) -> int:
        return len(self.path) - self.shared


def _in_order(rows: Sequence[Any]) -> list[int]:
    """Indices of the rows in lexicographic order."""
    return sorted(range(len(rows)), key=lambda i: rows[i].astype(">i8").tobytes())


def _common(left: Any, right: Any) -> int:
    """How many tokens two rows begin with alike."""
    size = min(len(left), len(right))
    different = np.flatnonzero(left[:size] != right[:size])
    return int(different[0]) if len(different) else size


def _alike(members: list[_Member]) -> list[list[_Member]]:
    """Rows in groups, those that share nothing apart, none padded to more than twice its own tokens."""
    groups: list[list[_Member]] = []
    for member in sorted(members, key=lambda m: (m.shared > 0, -m.own)):
        first = groups[-1][0] if groups else None
        if first is not None and (first.shared > 0) == (member.shared > 0) and 2 * member.own >= first.own:
            groups[-1].append(member)
        else:
            groups.append([member])
    return groups


# -- under a decoder --------------------------------------------------------------------------------------------------


def share_prefixes(model: Any) -> str | None:
    """From now on the decoder of `model` computes what rows begin with alike once, wherever it is called without cache.

    Nothing changes for the caller: hidden states come back in the batch's own shape (those of padding are arbitrary, as
    they always were). Whether the architecture keeps to that is tried here, on a few tokens, before it is relied on.
    Call it again to no effect; a model whose processes hold only parts of the weights must come here on all of them.

    Args:
        model: a language model or sequence classifier with a decoder, adapted or not.

    Returns:
        None, or why the model was left as it is, as a clause.
    """
    base = base_model(model)
    if reason := _stranger(model, base):
        return reason
    decoder = base.get_decoder()
    if "forward" in vars(decoder):
        return None if decoder.forward.__func__ is _forward else "something else stands in for its decoder's forward"
    config = decoder.config
    original = config._attn_implementation
    config._attn_implementation = _register(original)
    decoder.forward = types.MethodType(_forward, decoder)
    with ranks.gathered(model):
        reason = _tried(decoder)
    if reason:
        del decoder.forward
        config._attn_implementation = original
    return reason


def _stranger(model: Any, base: Any) -> str | None:
    """Why an architecture is none that can be tried, if so."""
    name = type(base).__name__
    config = getattr(base, "config", None)
    if config is None or not hasattr(base, "get_decoder"):
        return f"{name} is no transformers model with a decoder"
    if config.is_encoder_decoder:
        return f"{name} is an encoder-decoder: its answers are not in one row with their prompts"
    if getattr(model, "active_peft_config", None) is not None and model.active_peft_config.is_prompt_learning:
        return "its adapter learns a prompt, which it puts before every row"
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
    if strange := kinds - {"full_attention", "sliding_attention"}:
        return f"{name} has layers ({', '.join(sorted(strange))}) that carry state from token to token"
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager") and attention not in (_NAME.format("sdpa"), _NAME.format("eager")):
        return f"{name} runs with {attention}; it takes attn_implementation sdpa or eager"
    return None


def _register(original: str) -> str:
    """The name of an attention that is `original` except where a layout is handed along."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = _NAME.format(original)
    attention = _attention_sdpa if original == "sdpa" else _attention_eager
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


def _attention_sdpa(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # With a mask, transformers copies shared keys for every query head; CPU kernels read them where they are.
    grouped = query.device.type == "cpu" and not kwargs.get("dropout") and _LAYOUT in kwargs
    function = _grouped_sdpa if grouped else sdpa_attention_forward
    return _attention(function, False, module, query, key, value, attention_mask, kwargs)


def _grouped_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: Any = None, **_: Any
) -> tuple[Tensor, None]:
    shared = key.shape[1] < query.shape[1]
    attention = torch.nn.functional.scaled_dot_product_attention
    causal = mask is None and query.shape[2] > 1
    output = attention(query, key, value, attn_mask=mask, scale=scaling, is_causal=causal, enable_gqa=shared)
    return output.transpose(1, 2), None


def _attention_eager(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    # Each modelling file has its own: some cap the scores, some have sinks.
    function = sys.modules[type(module).__module__].eager_attention_forward
    return _attention(function, True, module, query, key, value, attention_mask, kwargs)


def _attention(
    function: Callable[..., Any],
    additive: bool,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    layout: Layout | None = kwargs.pop(_LAYOUT, None)
    if layout is None:
        return function(module, query, key, value, attention_mask, **kwargs)

    def of_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if additive:
            size = query.shape[2]
            seen = torch.ones((size, size), dtype=torch.bool, device=query.device).tril() if mask is None else mask
            mask = torch.where(seen, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
        return function(module, query, key, value, mask, **kwargs)[0]

    return layout.attend(of_rows, query, key, value, kwargs.get("sliding_window")), None


def _forward(self: Any, input_ids: Tensor | None = None, attention_mask: Any = None, **kwargs: Any) -> Any:
    """In place of a decoder's forward."""
    layout = None
    if _is_plain(self, input_ids, attention_mask, kwargs):
        assert input_ids is not None
        layout = layout_of(input_ids, attention_mask)
    if layout is None:
        return type(self).forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
    return _packed(self, layout, **kwargs)


def _packed(decoder: Any, layout: Layout, **kwargs: Any) -> Any:
    kwargs.pop("position_ids", None)
    output = type(decoder).forward(
        decoder,
        input_ids=layout.ids_P[None],
        position_ids=layout.position_P[None],
        # Never looked at; a mask of four dimensions is what decoders hand on as it is.
        attention_mask=layout.ids_P.new_ones((1, 1, 1, 1), dtype=torch.bool),
        **{**kwargs, "use_cache": False, _LAYOUT: layout},
    )
    output.last_hidden_state = _gather(output.last_hidden_state[0], layout.place_BS)
    return output


def layout_of(input_ids_BS: Tensor, attention_mask_BS: Tensor | None) -> Layout | None:
    """The layout of a padded batch; None where it would save nothing, where padding stands between tokens, or where a
    row is nothing but padding."""
    ids_BS = input_ids_BS.cpu().numpy()
    real_BS = np.ones_like(ids_BS, dtype=bool) if attention_mask_BS is None else attention_mask_BS.bool().cpu().numpy()
    starts, counts = real_BS.argmax(1), real_BS.sum(1)
    column_S = np.arange(ids_BS.shape[1])
    whole_BS = (column_S >= starts[:, None]) & (column_S < (starts + counts)[:, None])
    if not counts.all() or (whole_BS != real_BS).any():
        return None
    rows = [ids[real] for ids, real in zip(ids_BS, real_BS, strict=True)]
    ordered = [rows[i] for i in _in_order(rows)]
    repeated = sum(_common(before, row) for before, row in pairwise(ordered))
    if counts.sum() - repeated > WORTH * ids_BS.size:
        return None
    return lay_out(rows, starts, ids_BS.shape[1], input_ids_BS.device)


def _is_plain(decoder: Any, input_ids: Tensor | None, attention_mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for last hidden states of whole rows and nothing else."""
    if input_ids is None or input_ids.ndim != 2 or len(input_ids) < 2:
        return False
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2):
        return False
    use_cache = kwargs.get("use_cache")
    if not decoder.training and (getattr(decoder.config, "use_cache", True) if use_cache is None else use_cache):
        return False  # the caller may want the cache, which would hold the one sequence
    known = {"use_cache": (None, True, False), "return_dict": (None, True), "output_hidden_states": (None, False)}
    known["output_attentions"] = known["output_router_logits"] = (None, False)
    if decoder.config.output_hidden_states or getattr(decoder.config, "output_router_logits", False):
        return False
    # An unknown argument may speak of rows; position ids, of packed ones.
    return all(name in known and value in known[name] for name, value in kwargs.items() if value is not None)


@torch.no_grad()
def _tried(decoder: Any) -> str | None:
    """Why the packed forward of this decoder cannot be relied on, if so: it is compared with its own plain one."""
    name = type(decoder).__name__
    device = decoder.get_input_embeddings().weight.device
    size = min(decoder.config.get_text_config().vocab_size, 1000)
    stream = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, size, (24,), generator=stream).tolist()
    rows = [tokens[:7], [*tokens[:5], *tokens[9:12]], [*tokens[:5], *tokens[9:10], *tokens[14:18]], tokens[18:23]]
    ids_BS = torch.zeros((len(rows), 10), dtype=torch.long)
    mask_BS = torch.zeros((len(rows), 10), dtype=torch.long)
    for b, row in enumerate(rows):
        ids_BS[b, : len(row)], mask_BS[b, : len(row)] = torch.tensor(row), 1
    layout = lay_out(rows, [0] * len(rows), 10, device)
    training = decoder.training
    decoder.eval()
    try:
        plain = type(decoder).forward(
            decoder, input_ids=ids_BS.to(device), attention_mask=mask_BS.to(device), use_cache=False
        )
        packed = _packed(decoder, layout)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"{name} does not take rows laid out as one ({type(error).__name__}: {error})"
    finally:
        decoder.train(training)
    real_BS = mask_BS.bool().to(device)
    wanted, found = plain.last_hidden_state[real_BS].float(), packed.last_hidden_state[real_BS].float()
    off = float((found - wanted).norm() / wanted.norm())
    exact = plain.last_hidden_state.dtype == torch.float32
    if not off < (1e-4 if exact else 0.05):
        return f"{name}'s hidden states of rows laid out as one are {off:.1%} off its own"
    if layout.windows != _windows(decoder.config.get_text_config()):
        return f"{name} does not tell its attention how far back each layer sees"
    return None


def _windows(config: Any) -> list[int | None]:
    """How many positions each layer sees, as the config says; None: all."""
    count, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count
    return [window if kind == "sliding_attention" else None for kind in kinds]
