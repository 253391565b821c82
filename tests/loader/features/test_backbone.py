"""What tells one backbone from another."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from loader.assembly import View
from loader.features import Backbone, load_backbone
from loader.features.backbone import Shown
from shardspec.errors import ConfigError


class Scaled(nn.Module):
    """Has no weights: what it does is in its values and its code."""

    def __init__(self, factor, *, hidden=0.0):
        super().__init__()
        self.factors = [factor, 1]
        self._calls = 0
        self.register_buffer("hidden", torch.tensor(hidden), persistent=False)

    def forward(self, pixel_values):
        return pixel_values * self.factors[0] + self.hidden


def convolved(*rest, **options):
    made = nn.Sequential(nn.Conv2d(3, 4, 2, **options), *rest)
    nn.init.ones_(made[0].weight)
    nn.init.zeros_(made[0].bias)
    return made


@pytest.mark.parametrize(
    "make, other",
    [
        (lambda: convolved(stride=1), lambda: convolved(stride=2)),
        (lambda: convolved(nn.GELU()), lambda: convolved(nn.ReLU())),
        (lambda: convolved(nn.GELU()), lambda: convolved(nn.GELU("tanh"))),
        (lambda: Scaled(2), lambda: Scaled(3)),
        (lambda: nn.Sequential(Scaled(2)), lambda: nn.Sequential(Scaled(3))),
        (lambda: Scaled(2), lambda: Scaled(2, hidden=1.0)),
    ],
)
def test_modules_that_do_other_things_with_equal_weights_differ(make, other):
    fingerprints = [Backbone(each).fingerprint for each in (make(), make(), other())]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_use_does_not_change_a_fingerprint():
    module = Scaled(2)
    first = Backbone(module).fingerprint
    module.eval()
    module._calls += 1
    assert Backbone(module).fingerprint == first


def test_code_is_part_of_a_fingerprint(tmp_path, monkeypatch):
    found = []
    for i, body in enumerate(("x + 1", "x + 1", "x + 2", "x.neg()")):
        (tmp_path / f"tower{i}.py").write_text(
            f"import torch\nclass Base(torch.nn.Module):\n def forward(self, x):\n  return {body}\n"
            "class Tower(Base):\n pass\n"
        )
        found.append(load_backbone(f"{tmp_path}/tower{i}.py:Tower").fingerprint)
    assert found[0] == found[1]
    assert len(set(found)) == 3
    monkeypatch.syspath_prepend(tmp_path)
    assert Backbone(importlib.import_module("tower0").Tower()).fingerprint == found[0]


def refusal(call):
    with pytest.raises(ConfigError) as raised:
        call()
    assert raised.value.reason == "features_backbone"
    return str(raised.value)


def test_towers_of_which_several_layers_are_taken_are_refused():
    module = Scaled(2)
    module.config = SimpleNamespace(deepstack_visual_indexes=[0, 1])
    assert "several layers" in refusal(lambda: Backbone(module))


@pytest.mark.slow
def test_qwen3_vl_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "intermediate_size": 32}
    text = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    vision = {"depth": 3, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16}
    config = transformers.Qwen3VLConfig(
        text_config={**size, **text, "vocab_size": 100, "head_dim": 16},
        vision_config={**size, **vision, "deepstack_visual_indexes": [0, 1]},
    )
    transformers.Qwen3VLModel(config).save_pretrained(tmp_path)
    assert "several layers" in refusal(lambda: load_backbone(str(tmp_path)))


@pytest.mark.parametrize(
    "text", ["made = 1 / 0", "def made(x): pass", "def made(): raise KeyError(1)", "made ="]
)
def test_code_that_fails_is_named(tmp_path, text):
    (tmp_path / "tower.py").write_text(text)
    assert "Error" in refusal(lambda: load_backbone(f"{tmp_path}/tower.py:made"))


@pytest.mark.parametrize("device", ["cuda:77", "nonsense"])
def test_devices_that_are_not_here_are_named(device):
    assert device in refusal(lambda: Backbone(Scaled(1), device=device))


def test_a_module_that_fails_is_named():
    shown = [Shown(units=np.zeros((2, 3, 4, 4), np.float32))]
    told = refusal(lambda: Backbone(nn.Linear(5, 2))(shown, View()))
    assert "[2, 3, 4, 4]" in told
    with pytest.raises(RuntimeError):  # where a program calls it, it gets the error itself
        Backbone(nn.Linear(5, 2)).features(torch.zeros(1, 3))
