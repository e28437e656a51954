"""User code for type checkers. mypy checks it like the package, and it is never run."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import assert_type

from simple_hierarchical_transformer import HierarchicalTransformer, LossParts
from simple_hierarchical_transformer.generation.loop import Stream, TextStream
from simple_hierarchical_transformer.memory import State
from simple_hierarchical_transformer.merges.base import Contribution

# required options are required by type checkers too: an ignore that is not needed is an error
HierarchicalTransformer(num_tokens=256)  # type: ignore[call-arg]


class Wider(HierarchicalTransformer):
    pass


def use(model: HierarchicalTransformer, ids: Tensor, state: State | None, flag: bool) -> None:
    assert_type(model(ids), Tensor)
    assert_type(model(ids, ablate_hierarchical_merge=True), Tensor)
    assert_type(model(ids, return_state=True), tuple[Tensor, State])
    assert_type(model(ids, state=state, return_state=True), tuple[Tensor, State])
    assert_type(model(ids, return_loss=True), tuple[Tensor, LossParts])
    assert_type(model(ids, True, labels=ids), tuple[Tensor, LossParts])
    assert_type(model(ids, return_loss=True, return_state=True), tuple[Tensor, LossParts, State])
    assert_type(model(ids, return_hierarchical_token_embeds=True), list[Tensor])
    assert_type(model(ids, return_hierarchical_embeds=True), list[Tensor])
    assert_type(model(ids, return_logits_and_embeds=True), tuple[Tensor, list[Tensor]])
    assert_type(model(ids, return_logits_and_embeds=True, return_state=True), tuple[Tensor, list[Tensor], State])
    assert_type(model(ids, return_quantized_ids=True), list[Tensor | None])
    assert_type(model(ids, return_contributions=True), tuple[Tensor, list[Contribution]])
    model(ids, return_loss=flag)

    assert_type(model.generate(ids, 8), Tensor)
    assert_type(model.generate([ids, ids], 8, 0.9, top_k=4), Tensor)
    assert_type(model.generate(ids, 8, return_state=True), tuple[Tensor, State])
    assert_type(model.generate('text', max_new_tokens=8, stop='\n'), str)
    assert_type(model.generate(b'text', 8, repetition_penalty=1.2, return_state=True), tuple[bytes, State])
    assert_type(model.generate(['text', 'texts'], 8), list[str])
    assert_type(model.score(ids), float)
    assert_type(model.score(b'text', return_log_probs=True), tuple[float, Tensor])
    stream = model.stream(ids, 8, temperature=0)
    assert_type(stream, Stream)
    assert_type(next(stream), Tensor)
    assert_type([new for new in stream], list[Tensor])  # noqa: C416
    assert_type(stream.state, State)
    assert_type(model.stream('text', 8, top_k=4), TextStream)

    assert_type(HierarchicalTransformer.from_pretrained('folder'), HierarchicalTransformer)
    assert_type(Wider.from_pretrained('folder', map_location='cpu'), Wider)
    assert_type(model.eval(), HierarchicalTransformer)
