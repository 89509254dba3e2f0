"""The files under configs/accelerate: each key says what it is for, accelerate reads them, the docs name them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from align import ranks
from reward.records import InputError

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs/accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_explained_and_the_file_documented(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    keys = [line for line in lines if not line.startswith("#")]
    assert lines[0].startswith("# ") and keys
    assert [line for line in keys if "  # " not in line and " # " not in line] == []
    assert f"`{path.name}`" in (ROOT / "docs/launchers.md").read_text("utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_takes_every_setting(path: Path) -> None:
    loaded, written = load_config_from_file(str(path)), yaml.safe_load(path.read_text("utf-8"))
    for section in ("deepspeed_config", "fsdp_config"):
        assert getattr(loaded, section, {}) == written.get(section, {})
    assert loaded.num_processes == written["num_processes"]


def test_fsdp_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate leaves it out there without a word."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=r"FSDP .*cpu\.yaml"):
        ranks.start()
