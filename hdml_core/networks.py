"""The four networks: extractor f, embedder g, generator i and the softmax head.

The extractor is a torchvision network up to its global average pool, or a small convnet for one-channel glyphs; on
cached features it is the identity. The three others are the paper's, with Glorot-uniform weights and zero biases as
in the authors' code.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hdml_core.config import ConfigError, NetworkConfig


class Networks(nn.Module):
    """f, g, i and the head, under their names."""

    def __init__(self, extractor: nn.Module, embedder: nn.Module, generator: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor
        self.embedder = embedder
        self.generator = generator
        self.head = head


class Extractor(nn.Module):
    """A network f from images to features of size `feature_size`, its batch norm learning or left as it is."""

    def __init__(self, body: nn.Module, feature_size: int, batch_norm_frozen: bool) -> None:
        super().__init__()
        self.body = body
        self.feature_size = feature_size
        self.batch_norm_frozen = batch_norm_frozen
        if batch_norm_frozen:
            for layer in self._batch_norms():
                layer.requires_grad_(False)
        self.train()

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b f"]:
        return self.body(images)

    def train(self, mode: bool = True) -> "Extractor":
        super().train(mode)
        if self.batch_norm_frozen:
            for layer in self._batch_norms():
                layer.eval()
        return self

    def _batch_norms(self) -> list[nn.Module]:
        return [layer for layer in self.body.modules() if isinstance(layer, nn.BatchNorm2d)]


class _Body(NamedTuple):
    build: Callable[[], nn.Module]
    classifier: str
    feature_size: int
    channels: int


def _convnet() -> nn.Module:
    """Four blocks of 3 x 3 convolution, batch norm, ReLU and pooling; 32, 64, 128, 128 channels."""
    layers: list[nn.Module] = []
    sizes = (1, 32, 64, 128, 128)
    for number, (before, after) in enumerate(pairwise(sizes), start=1):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers.append(nn.MaxPool2d(2) if number < 4 else nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten())


# Name -> how to build it, which layer is its classifier (cut off), size of its feature, channels of its images.
EXTRACTORS: Mapping[str, _Body] = {
    "convnet": _Body(_convnet, "", 128, 1),
    # Its weights want pixels in [-1, 1]: transform_input makes them so from those that are normalised as ImageNet's.
    "googlenet": _Body(
        lambda: torchvision.models.googlenet(weights=None, init_weights=True, aux_logits=False, transform_input=True),
        "fc",
        1024,
        3,
    ),
    "resnet50": _Body(lambda: torchvision.models.resnet50(weights=None), "fc", 2048, 3),
    "mobilenet_v2": _Body(lambda: torchvision.models.mobilenet_v2(weights=None), "classifier", 1280, 3),
}


def demand_channels(config: NetworkConfig, channels: int) -> None:
    """Raise ConfigError where the extractor does not take images of so many channels."""
    wanted = EXTRACTORS[config.extractor].channels
    if channels != wanted:
        fitting = [name for name, body in EXTRACTORS.items() if body.channels == channels]
        raise ConfigError(
            f"network.extractor must be one of {', '.join(fitting)} for images of {channels} channels, "
            f"got {config.extractor!r}, which takes {wanted}"
        )


def build_extractor(config: NetworkConfig) -> Extractor:
    """Return f, with random weights, torchvision's, or those of a safetensors state dict.

    Raises ConfigError where the weights are unknown, missing, damaged or do not fit the network.
    """
    body = EXTRACTORS[config.extractor]
    network = body.build()
    if config.weights:
        _load_weights(network, config)
    if body.classifier:
        setattr(network, body.classifier, nn.Identity())
    if config.extractor == "googlenet":
        network.dropout = nn.Identity()
    return Extractor(network, body.feature_size, batch_norm_frozen=config.batch_norm == "frozen" or config.frozen)


def _load_weights(network: nn.Module, config: NetworkConfig) -> None:
    given = f"network.weights {config.weights!r}"
    if config.weights.endswith(".safetensors"):
        path = Path(config.weights).expanduser()
        if not path.is_file():
            raise ConfigError(f"{given}: no such file")
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"{given} is not a whole safetensors file: {error}") from error
    else:
        if config.extractor == "convnet":
            raise ConfigError(f"{given}: convnet has no torchvision weights; give a .safetensors path or nothing")
        known = list(torchvision.models.get_model_weights(config.extractor).__members__)
        if config.weights not in known:
            raise ConfigError(f"{given} must be a path ending in .safetensors or one of {', '.join(known)}")
        weights = torchvision.models.get_model_weights(config.extractor)[config.weights]
        state = weights.get_state_dict(progress=True, check_hash=True)
    wanted = network.state_dict()
    cut = "aux"  # googlenet's auxiliary classifiers, which torchvision's weights carry
    state = {name: value for name, value in state.items() if not name.startswith(cut)}
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in wanted]
    misfits = [f"{n} {tuple(v.shape)}" for n, v in state.items() if n in wanted and v.shape != wanted[n].shape]
    if missing or unknown or misfits:
        raise ConfigError(
            f"{given} does not fit {config.extractor}: {len(missing)} entries missing, {len(unknown)} unknown, "
            f"{len(misfits)} of another shape; the first is {[*missing, *unknown, *misfits][0]}"
        )
    network.load_state_dict({name: value.to(wanted[name].dtype) for name, value in state.items()}, strict=False)


def build_networks(config: NetworkConfig, num_classes: int, feature_size: int | None) -> Networks:
    """Return the four networks on the CPU, drawn from torch's global generator.

    `feature_size` is given where the rows are features already; f is then the identity.
    """
    extractor = nn.Identity() if feature_size is not None else build_extractor(config)
    f = feature_size if feature_size is not None else EXTRACTORS[config.extractor].feature_size
    d = config.embedding_size
    embedder = nn.Sequential(nn.BatchNorm1d(f), nn.Linear(f, d)) if config.embedder_batch_norm else nn.Linear(f, d)
    hidden = config.generator_hidden
    generator = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.BatchNorm1d(hidden), nn.Linear(hidden, f))
    head = nn.Linear(f, num_classes)
    for layer in (*embedder.modules(), *generator.modules(), head):
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return Networks(extractor, embedder, generator, head)


def mix_precision(networks: Networks) -> None:
    """Let every network compute in bfloat16 where autocast holds that safe, and hand out float32."""
    for network in networks.children():
        network.forward = _in_bfloat16(network.forward)


def _in_bfloat16(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def mixed(rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, torch.bfloat16):
            return forward(rows).float()

    return mixed
