"""The report's printed figures stand beside the runs of its own models, and of no others."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from align.report.published import published_figures
from align.report.read import read_run

LITE = {"model_type": "deepseek_v2", "num_hidden_layers": 27, "hidden_size": 2048, "n_routed_experts": 64}
LARGE = {"model_type": "deepseek_v2", "num_hidden_layers": 60, "hidden_size": 5120, "n_routed_experts": 160}


@pytest.mark.parametrize(
    ("name", "config", "model"),
    [
        ("models/mine", LITE, "DeepSeek-V2-Lite"),
        ("models/mine", LARGE, "DeepSeek-V2"),
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", None, "DeepSeek-V2-Lite"),
        ("deepseek-ai/DeepSeek-V2", None, "DeepSeek-V2"),
        ("deepseek-ai/DeepSeek-Coder-V2-Lite-Base", LITE, None),
        ("deepseek-ai/DeepSeek-V2.5", LARGE, None),
        ("deepseek-ai/DeepSeek-V2", LITE | {"hidden_size": 128}, None),
        ("models/mine", None, None),
        ("models/mine", LITE | {"model_type": "deepseek_v3"}, None),
    ],
)
def test_a_model_is_known_by_its_sizes_or_else_by_its_name(
    tmp_path: Path, write_run: Callable[..., Path], name: str, config: dict[str, object] | None, model: str | None
) -> None:
    root = write_run(tmp_path / "run", recipe={"model": {"path": name}}, tokenizer=False)
    if config is not None:
        (root / "final").mkdir()
        (root / "final" / "config.json").write_text(json.dumps(config))
    found = published_figures(read_run(root))
    assert (found.model if found else None) == model


def test_the_figures_are_those_of_the_report(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    lite = published_figures(
        read_run(write_run(tmp_path / "a", recipe={"model": {"path": "DeepSeek-V2-Lite"}}, tokenizer=False))
    )
    large = published_figures(
        read_run(write_run(tmp_path / "b", recipe={"model": {"path": "DeepSeek-V2"}}, tokenizer=False))
    )
    assert lite is not None
    assert large is not None
    assert "arXiv:2405.04434" in lite.source
    # Table 7 for Lite, of which no reinforcement learning was reported; Table 3 for the large model.
    assert list(lite.figures) == ["base", "Chat (SFT)"]
    assert lite.figures["Chat (SFT)"]["GSM8K"] == 72.0
    assert (large.figures["Chat (SFT)"]["BBH"], large.figures["Chat (RL)"]["BBH"]) == (81.3, 79.7)
    assert large.benchmarks[0] == "MMLU"
