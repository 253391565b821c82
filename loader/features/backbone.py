"""Backbone: a vision model that never changes, what identifies it, and how it is called.

It is a module of torch that takes `pixel_values` and gives a tensor, or what models of transformers
give. A model with a language part is asked for its vision tower. What a call needs besides pixels
follows from the family of the dataset: Qwen2-VL's tower takes `grid_thw`, Pixtral's `image_sizes`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from loader.assembly import View
from loader.user_code import source_of
from shardspec.errors import ConfigError, ShardsError
from shardspec.families import PicturePlan, Pixtral, Qwen2VL
from shardspec.manifest import Manifest, require_manifest

Tokens = Literal["all", "patches"]
Compute = Literal["float32", "bfloat16", "float16"]

_UNSEEN = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "architectures")
"""What a configuration says without meaning for the features."""

_TOWERS = ("vision_tower", "visual", "vision_model")
"""What models with a language part call theirs."""


@dataclass(slots=True, kw_only=True)
class Shown:
    """The pixels of one picture."""

    units: np.ndarray
    """[n, ...]: crops, tiles or patches."""
    plan: PicturePlan | None = None
    """Of a family's picture."""


class Backbone:
    """A frozen vision model."""

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        name: str = "",
        layer: int | None = None,
        tokens: Tokens = "all",
        compute: Compute = "float32",
        device: str = "cpu",
    ) -> None:
        """Takes a module over: it is put on the device, and into evaluation.

        Args:
          module: Takes `pixel_values`, and for models of the families qwen2_vl and pixtral
            `grid_thw` or `image_sizes`.
          name: What it was loaded from, for people.
          layer: Number of the hidden states that are its features, as transformers counts them (-2
            is the last but one); None: what it returns.
          tokens: "patches" leaves the first token out, which is the class token of CLIP.
          compute: Type of weights and pixels.
          device: Where it runs.

        Raises:
          ConfigError: `argument`; `features_backbone`.
        """
        for label, value, known in (("tokens", tokens, Tokens), ("compute", compute, Compute)):
            if value not in get_args(known):
                wanted = "one of " + ", ".join(map(repr, get_args(known)))
                raise ConfigError("argument", name=label, got=repr(value), wanted=wanted)
        if getattr(getattr(module, "config", None), "deepstack_visual_indexes", None):
            raise ConfigError("features_backbone.several", where=name)
        self.name, self.layer, self.tokens, self.compute = name, layer, tokens, compute
        self.fingerprint = module_fingerprint(module)
        """Of its configuration and weights, as they were given."""
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:  # of no such type, or of none that is here
            raise ConfigError(
                "features_backbone.device", where=name, device=device, error=_first_line(error)
            ) from error
        self.module = module.eval().requires_grad_(requires_grad=False)
        self.module.to(self.device, getattr(torch, compute))

    @property
    def identity(self) -> str:
        """All that its features of given pixels follow from, for a `FeatureCache`."""
        return f"{self.fingerprint} {self.layer} {self.tokens} {self.compute}"

    def __call__(self, shown: Sequence[Shown], view: View) -> list[np.ndarray]:
        """Makes the features of pictures, all of them in one call.

        Args:
          shown: At least one, of units of one shape.
          view: Whose pixels they are.

        Returns:
          float32 [rows, ...] for each.

        Raises:
          ConfigError: `features_backbone`: the module raises, or its result is not an array of
            rows for each picture.
        """
        sizes = [len(each.units) for each in shown]
        joined = np.ascontiguousarray(np.concatenate([each.units for each in shown]))
        pixels = torch.from_numpy(joined).to(self.device)
        if pixels.dtype != torch.uint8:
            pixels = pixels.to(getattr(torch, self.compute))
        family = None if view.model is None else view.model.family
        try:
            values = self.features(pixels, **_further(family, shown, self.device))
        except (ShardsError, MemoryError):
            raise
        except Exception as error:
            raise ConfigError(
                "features_backbone.raised",
                where=self.name,
                pixels=list(pixels.shape),
                error=f"{type(error).__name__}: {_first_line(error)}",
            ) from error
        if isinstance(family, Pixtral) and values.ndim == 3 and len(values) == 1:
            values = values[0]  # the patches of all pictures, one after the other
        # As many rows for each unit, or each for as many units.
        num_rows = len(values) if values.ndim in (2, 3) else 0
        ends = [num_rows * done / sum(sizes) for done in accumulate(sizes)]
        wrong = num_rows != sum(sizes) if family is None else any(end % 1 for end in ends)
        if not num_rows or wrong:  # a crop is a row; of a family the loader compares
            raise self._wrong(values, sum(sizes))
        starts = [0, *map(int, ends)]
        array = values.to(torch.float32).cpu().numpy()
        return [array[a:b] for a, b in pairwise(starts)]

    def features(self, pixel_values: torch.Tensor, **further: Any) -> torch.Tensor:
        """Runs the module, and gives what is taken of its result.

        Args:
          pixel_values: On the device.
          further: Other arguments of the module.
        """
        if self.layer is not None:
            if not hasattr(self.module, "config"):  # it would not know the argument
                raise self._no_layer(0)
            further["output_hidden_states"] = True
        with torch.no_grad():
            result = self.module(pixel_values, **further)
        values = result
        if self.layer is not None:
            states = getattr(result, "hidden_states", None)
            if states is None or not -len(states) <= self.layer < len(states):
                raise self._no_layer(len(states or ()))
            values = states[self.layer]
        elif not isinstance(result, torch.Tensor):
            # What Qwen2-VL's tower calls pooled are the features that replace tokens.
            merged = getattr(result, "pooler_output", None) if "grid_thw" in further else None
            values = getattr(result, "last_hidden_state", None) if merged is None else merged
            values = result[0] if values is None else values
        if not isinstance(values, torch.Tensor):
            raise ConfigError(
                "features_backbone.result", where=self.name, got=type(values).__name__
            )
        if self.tokens == "patches":
            if values.ndim != 3:
                raise self._wrong(values, len(pixel_values))
            values = values[:, 1:]
        return values

    def _no_layer(self, states: int) -> ConfigError:
        return ConfigError(
            "features_backbone.layer", where=self.name, layer=self.layer, states=states
        )

    def _wrong(self, values: torch.Tensor, units: int) -> ConfigError:
        return ConfigError(
            "features_backbone.shape", where=self.name, got=tuple(values.shape), units=units
        )


def _further(family: Any, shown: Sequence[Shown], device: torch.device) -> dict[str, torch.Tensor]:
    plans = [each.plan for each in shown if each.plan is not None]
    if isinstance(family, Qwen2VL):
        return {"grid_thw": torch.tensor([(1, *plan.grid) for plan in plans], device=device)}
    if isinstance(family, Pixtral):
        return {"image_sizes": torch.tensor([plan.resized for plan in plans], device=device)}
    return {}


def module_fingerprint(module: torch.nn.Module) -> str:
    """Hashes a module: its class, what it does with its weights, and every weight.

    What it does is its configuration, of a model of transformers; of any other its structure, the
    source of its classes, and the plain values that they hold under public names. What they call
    elsewhere is not seen.
    """
    head = json.dumps(
        [type(module).__qualname__, _described(module)],
        sort_keys=True,
        default=str,
        separators=(",", ":"),
    )
    hashed = hashlib.sha256(head.encode())
    tensors = module.state_dict()
    if _configuration(module) is None:
        # Buffers that are not saved follow from a configuration, where there is one.
        tensors |= dict(module.named_buffers())
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, torch.Tensor):
            hashed.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            hashed.update(flat.view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _configuration(module: torch.nn.Module) -> dict[str, Any] | None:
    made = getattr(getattr(module, "config", None), "to_dict", None)
    if made is None:
        return None
    return {name: value for name, value in made().items() if name not in _UNSEEN}


def _described(module: torch.nn.Module) -> Any:
    """Describes what a module does with its weights, in JSON types."""
    known = _configuration(module)
    if known is not None:
        return known
    fields = {
        name: repr(value)
        for name, value in vars(module).items()
        if name != "training" and name[0] != "_" and _is_plain(value)
    }
    parts = [[name, _described(part)] for name, part in module.named_children()]
    return [[*map(source_of, type(module).__mro__)], module.extra_repr(), fields, parts]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def check_backbone(dataset: str | Manifest, backbone: Backbone | torch.nn.Module) -> None:
    """Refuses a backbone whose features are not those of a dataset.

    Args:
      dataset: Its URL, or its manifest.
      backbone: As it was given for the features: before it is cast to another type.

    Raises:
      ConfigError: `features_view`: it has another configuration, or other weights; or the dataset
        has no features.
    """
    manifest = require_manifest(dataset) if isinstance(dataset, str) else dataset
    where = dataset if isinstance(dataset, str) else manifest.dataset
    stored = manifest.recipe.get("features")
    if stored is None:
        raise ConfigError("features_view.none", where=where)
    own = backbone.fingerprint if isinstance(backbone, Backbone) else module_fingerprint(backbone)
    if own != stored["fingerprint"]:
        raise ConfigError(
            "features_view.backbone",
            where=where,
            backbone=stored["backbone"],
            got=own,
            want=stored["fingerprint"],
        )


def load_backbone(
    source: str,
    *,
    layer: int | None = None,
    tokens: Tokens | None = None,
    compute: Compute = "float32",
    device: str = "cpu",
) -> Backbone:
    """Loads a backbone by its name.

    Args:
      source: Hub id or folder of a model of transformers, of which the vision tower is taken where
        it has a language part; or "package.module:name" or "file.py:name" of a module of torch, or
        of a function that gives one.
      layer: As of `Backbone`; None takes that of a LLaVA's configuration.
      tokens: Likewise.
      compute, device: As of `Backbone`.

    Raises:
      ConfigError: `features_backbone`.
    """
    path, mark, attribute = source.rpartition(":")
    if mark and not Path(source).is_dir() and attribute.isidentifier():
        module, usual_layer, usual_tokens = _imported(path, attribute, source), None, None
    else:
        module, usual_layer, usual_tokens = _from_transformers(source)
    return Backbone(
        module,
        name=source,
        layer=usual_layer if layer is None else layer,
        tokens=tokens or usual_tokens or "all",
        compute=compute,
        device=device,
    )


def _imported(path: str, attribute: str, source: str) -> torch.nn.Module:
    try:
        if path.endswith(".py"):
            name = f"backbone {Path(path).absolute()}"  # hides no module that is imported by name
            spec = importlib.util.spec_from_file_location(name, path)
            if spec is None or spec.loader is None:
                raise ImportError(path)
            loaded = importlib.util.module_from_spec(spec)
            sys.modules[name] = loaded  # the source of its classes is found by it
            spec.loader.exec_module(loaded)
        else:
            loaded = importlib.import_module(path)
        found = getattr(loaded, attribute)
        made = found if isinstance(found, torch.nn.Module) or not callable(found) else found()
    except (ShardsError, MemoryError):
        raise
    except Exception as error:  # of the user's code
        problem = f"{type(error).__name__}: {_first_line(error)}"
        raise ConfigError("features_backbone.missing", where=source, error=problem) from error
    if not isinstance(made, torch.nn.Module):
        raise ConfigError("features_backbone.module", where=source, got=type(made).__name__)
    return made


def _from_transformers(source: str) -> tuple[torch.nn.Module, int | None, Tokens | None]:
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ConfigError("features_backbone.missing", where=source, error=error) from error
    try:
        model, loading = AutoModel.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            "features_backbone.missing", where=source, error=_first_line(error)
        ) from error
    config = model.config
    several = getattr(config, "vision_config", None) is not None
    name, tower = ("", model) if not several else _tower_of(model, source)
    # What is missing was drawn at random.
    absent = sorted(key for key in loading["missing_keys"] if key.startswith(name))
    if absent:
        raise ConfigError("features_backbone.weights", where=source, missing=absent[:5])
    if not several:
        return model, None, None
    layer = getattr(config, "vision_feature_layer", None)
    if isinstance(layer, list | tuple):
        raise ConfigError("features_backbone.several", where=source)
    if layer == -1 and config.model_type.startswith("internvl"):
        layer = None  # it takes the last one after its norm
    strategy = getattr(config, "vision_feature_select_strategy", None)
    return tower, layer, None if strategy is None else _STRATEGIES.get(strategy)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _tower_of(model: Any, source: str) -> tuple[str, torch.nn.Module]:
    """Finds the vision tower of a model with a language part, and what its weights begin with."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _TOWERS:
            return f"{name}.", module
    raise ConfigError("features_backbone.tower", where=source, model_type=model.config.model_type)


_STRATEGIES: dict[str, Tokens] = {"default": "patches", "full": "all"}
