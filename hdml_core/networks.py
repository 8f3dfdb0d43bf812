"""The four networks: extractor f, embedder g, generator i and the softmax head.

The extractor is a torchvision network up to its global average pool, or a small convnet for one-channel glyphs; on
the cached activations of a frozen stem it is what comes after the stem, and on cached features it is the identity. The
three others are the paper's, with Glorot-uniform weights and zero biases as in the authors' code.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx, nn
from torch.nn import functional as F

from hdml_core.config import Config, ConfigError, NetworkConfig, SynthesisName
from hdml_core.errors import did_you_mean


class Networks(nn.Module):
    """f, g, i, the head and, where the metric loss learns something itself, that, under their names."""

    def __init__(self, extractor: nn.Module, embedder: nn.Module, generator: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor
        self.embedder = embedder
        self.generator = generator
        self.head = head
        self.loss: nn.Module = nn.Identity()
        self.mixed = False

    def precision(self) -> torch.autocast:
        """Return the context in which to use layers one by one; what they give may then be bfloat16."""
        return torch.autocast(next(self.head.parameters()).device.type, torch.bfloat16, enabled=self.mixed)


class Extractor(nn.Module):
    """A network f, or a part of it, its batch norm learning or left as it is."""

    def __init__(self, body: nn.Module, batch_norm_frozen: bool) -> None:
        super().__init__()
        self.body = body
        self.batch_norm_frozen = batch_norm_frozen
        if batch_norm_frozen:
            for layer in self._batch_norms():
                layer.requires_grad_(False)
        self.train()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b ..."]:
        return self.body(x)

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
    return Extractor(network, batch_norm_frozen=config.batch_norm == "frozen")


class ExtractorParts(NamedTuple):
    """An extractor in two: tail(stem(images)) is f(images), bit for bit."""

    stem: Extractor
    """Images to activations (b, c, h, w): the layer `network.frozen` and all before it, batch norm left as it is."""
    tail: Extractor
    """Activations to features (b, f), its entries named in the state dict as in that of f."""


def cut_extractor(config: NetworkConfig) -> ExtractorParts:
    """Return f cut after its layer `config.frozen`.

    Raises ConfigError for the weights, as `build_extractor` does, and where f can't be cut at such a layer: it is
    unknown, other values than its output pass by it, as by a layer within a residual block, or nothing learns after it.
    """
    whole = build_extractor(config)
    tracer = _LayerTracer()
    nodes = list(tracer.trace(whole.body).nodes)
    cuts = _cuts(whole.body, nodes, tracer.outputs)
    if config.frozen not in cuts:
        outermost = [layer for layer in cuts if not any(layer.startswith(f"{other}.") for other in cuts)]
        raise ConfigError(
            f"network.frozen must be '', 'all' or a layer of {config.extractor} whose output is all that later layers "
            f"need, such as {', '.join(outermost)}, got {config.frozen!r}{did_you_mean(config.frozen, outermost)}"
        )
    last, stem_nodes = tracer.outputs[config.frozen], cuts[config.frozen]
    stem, tail = fx.Graph(), fx.Graph()
    in_stem: dict[fx.Node, fx.Node] = {}
    in_tail = {last: tail.placeholder("activations")}
    for node in nodes:
        graph, copies = (stem, in_stem) if node in stem_nodes else (tail, in_tail)
        copies[node] = graph.node_copy(node, copies.__getitem__)
    stem.output(in_stem[last])
    return ExtractorParts(
        Extractor(fx.GraphModule(whole.body, stem), batch_norm_frozen=True),
        Extractor(fx.GraphModule(whole.body, tail), whole.batch_norm_frozen),
    )


class _LayerTracer(fx.Tracer):
    """Traces a network and notes which node is the output of which layer, of its last call where it has several."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, fx.Node] = {}

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        self.outputs[self.path_of_module(m)] = output.node
        return output


def _cuts(body: nn.Module, nodes: Sequence[fx.Node], outputs: Mapping[str, fx.Node]) -> dict[str, set[fx.Node]]:
    """Return the nodes up to each layer's output, of the layers that nothing passes by and after which some learn."""
    up_to: dict[fx.Node, set[fx.Node]] = {}
    for node in nodes:
        up_to[node] = {node}.union(*(up_to[source] for source in node.all_input_nodes))
    cuts = {}
    for layer, last in outputs.items():
        rest = [node for node in nodes if node not in up_to[last]]
        passed_on = {source for node in rest for source in node.all_input_nodes} & up_to[last]
        later = [body.get_submodule(str(node.target)) for node in rest if node.op == "call_module"]
        if passed_on == {last} and any(list(module.parameters()) for module in later):
            cuts[layer] = up_to[last]
    return cuts


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


class TupleGenerator(nn.Module):
    """DAML's generator G: three fully connected layers from the features of a tuple to a synthetic negative's.

    The first layer is linear in the concatenation (y-, y, y+): each role meets its block of the weights, and the three
    images are added, so that of roles which broadcast n rows of each are multiplied, and no n x n of 3f are laid out.
    """

    def __init__(self, feature_size: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(3 * feature_size, hidden)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, feature_size))

    def forward(
        self, negative: Float[Tensor, "*#b f"], anchor: Float[Tensor, "*#b f"], positive: Float[Tensor, "*#b f"]
    ) -> Float[Tensor, "*b f"]:
        of_negative, of_anchor, of_positive = self.first.weight.chunk(3, dim=1)
        of_real = F.linear(anchor, of_anchor, self.first.bias) + F.linear(positive, of_positive)
        return self.rest(F.linear(negative, of_negative) + of_real)


def build_networks(
    config: NetworkConfig, num_classes: int, feature_size: int | None, synthesis: SynthesisName = "hdml"
) -> Networks:
    """Return the networks on the CPU, drawn from torch's global generator.

    `feature_size` is given where the rows are features already; f is then the identity. Where a layer of f is frozen,
    the rows are its activations, and f is the tail.
    """
    extractor: nn.Module
    if feature_size is not None:
        extractor = nn.Identity()
    else:
        extractor = cut_extractor(config).tail if config.frozen else build_extractor(config)
    f = feature_size if feature_size is not None else EXTRACTORS[config.extractor].feature_size
    d = config.embedding_size
    embedder = nn.Sequential(nn.BatchNorm1d(f), nn.Linear(f, d)) if config.embedder_batch_norm else nn.Linear(f, d)
    # HDML's generator, at its usual size, is drawn in every method, so that all start from one embedder for one seed.
    hidden = config.generator_hidden if synthesis == "hdml" else NetworkConfig.generator_hidden
    generator: nn.Module = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.BatchNorm1d(hidden), nn.Linear(hidden, f))
    head = nn.Linear(f, num_classes)
    _draw(embedder, generator, head)
    if synthesis == "daml":
        generator = TupleGenerator(f, config.generator_hidden)
        _draw(generator)
    return Networks(extractor, embedder, generator, head)


def _draw(*networks: nn.Module) -> None:
    """Give linear layers Glorot-uniform weights and zero biases."""
    for network in networks:
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)


def mix_precision(networks: Networks) -> None:
    """Let each of the four networks compute in bfloat16 where autocast holds that safe, and hand out float32."""
    networks.mixed = True
    for network in (networks.extractor, networks.embedder, networks.generator, networks.head):
        network.forward = _in_bfloat16(network.forward)


def _in_bfloat16(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def mixed(*rows: Tensor) -> Tensor:
        with torch.autocast(rows[0].device.type, torch.bfloat16):
            return forward(*rows).float()

    return mixed


def decay_penalty(networks: Networks, config: Config) -> Float[Tensor, ""] | float:
    """Return what J_m has of weight decay: 0.5 weight_decay times the sum of squares of what decays, or nothing."""
    if not config.hdml.weight_decay_in_j_m or config.optim.weight_decay == 0:
        return 0.0
    return 0.5 * config.optim.weight_decay * torch.stack([p.square().sum() for p in decayed(networks)]).sum()


def decayed(networks: Networks) -> list[nn.Parameter]:
    """Return the trained parameters of f and g that weight decay pulls on: all but those of batch norm."""
    return [
        parameter
        for network in (networks.extractor, networks.embedder)
        for layer in network.modules()
        if not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
        for parameter in layer.parameters(recurse=False)
        if parameter.requires_grad
    ]
