"""Generation, streams and scores of models with placed levels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support.placed import NESTED, TEXT, placed

from simple_hierarchical_transformer.generation.captured import is_capturable
from simple_hierarchical_transformer.sample import main
from simple_hierarchical_transformer.segmentation import MARK


@pytest.mark.parametrize('boundaries', NESTED, ids=str)
def test_streams_scores_and_cached_text_are_those_of_one_pass(boundaries: tuple[str | None, ...]) -> None:
    model, text = placed(boundaries, seq_len=128), TEXT.encode()
    # its steps depend on the text, so no graph of them serves every position
    assert not is_capturable(model)
    new = model.generate(text, 40, temperature=0.0)
    assert new == model.generate(text, 40, temperature=0.0, use_cache=False)
    assert b''.join(model.stream(text, 40, temperature=0.0)) == new
    stream = model.stream(text, 5, temperature=0.0)
    begun = b''.join(stream)
    # the state after them goes on as the text does
    logits, _ = model(torch.tensor([list(new[5:6])]), state=stream.state, return_state=True)
    with torch.no_grad():
        whole = model(torch.tensor([list(text + begun + new[5:6])]))
    torch.testing.assert_close(logits[:, -1], whole[:, -1], rtol=0, atol=1e-10)
    assert model.score(text) == pytest.approx(model.score(text, chunk_size=9), abs=1e-10)


def test_prompts_of_unequal_lengths_get_the_text_they_would_get_alone() -> None:
    model = placed((None, 'words', 'learned'), seq_len=128)
    prompts = ['The cat sat.', 'A much longer prompt, of many words. ', 'x']
    assert model.generate(prompts, 20, temperature=0.0) == [
        model.generate(prompt, 20, temperature=0.0) for prompt in prompts
    ]


def test_a_sample_shows_its_pieces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = placed((None, 'words', 'sentences')).float()
    model.save_pretrained(tmp_path)
    arguments = [str(tmp_path), '--prompt', 'The cat. \u65e5\u672c', '--length', '30', '--temperature', '0']
    main(arguments)
    plain = capsys.readouterr().out
    main([*arguments, '--show-boundaries'])
    shown = capsys.readouterr().out
    assert shown.startswith('T||he |cat.|| \u65e5\u672c|')
    assert shown.replace(MARK, '') == plain.replace(MARK, '')
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    monkeypatch.delenv('NO_COLOR', raising=False)
    main([*arguments, '--show-boundaries'])
    assert '\033[35m||\033[0m' in capsys.readouterr().out


def test_a_model_without_placed_levels_has_no_boundaries_to_show(tmp_path: Path) -> None:
    placed((None, None, None), hierarchical_stride=(1, 8, 32)).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match='levels with boundaries, and this model has none'):
        main([str(tmp_path), '--show-boundaries'])
