"""Every setting of a run: one frozen tree of dataclasses, checked when it is made, addressed by dotted names.

`recipe_config` builds the tree: a recipe (`paper` or `authors`), then what that recipe sets for a data set and a
loss, then the caller's own settings. Nothing else in the project chooses a default.

Source marks: [c] the authors' code, [s] agreeing second-hand sources, [m] from memory of the paper.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hdml_core.errors import ConfigError as ConfigError
from hdml_core.errors import did_you_mean

Setting = bool | int | float | str | tuple[int, ...]
Settings = Mapping[str, Setting]


def _need(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {rule}, got {value!r}")


def _check_types(section: Any, prefix: str) -> None:
    """Every field has the type that it declares; an int is not a float, a bool is not an int."""
    for name, hint in get_type_hints(type(section)).items():
        value = getattr(section, name)
        if get_origin(hint) is Literal:
            choices = get_args(hint)
            _need(value in choices, prefix + name, f"one of {', '.join(map(repr, choices))}", value)
        elif get_origin(hint) is tuple:
            whole = isinstance(value, tuple) and all(type(item) is int for item in value)
            _need(whole, prefix + name, "a tuple of whole numbers", value)
        else:
            _need(type(value) is hint, prefix + name, f"of type {hint.__name__}", value)
        if isinstance(value, float):
            _need(not math.isnan(value), prefix + name, "a number", value)


DatasetName = Literal["glyphs", "omniglot", "cub200", "cars196", "sop", "folder", "features"]
ExtractorName = Literal["convnet", "googlenet", "resnet50", "mobilenet_v2"]
SynthesisName = Literal["none", "hdml", "daml"]
MetricLossName = Literal["npair", "triplet", "contrastive", "semihard", "lifted", "angular", "ddml"]


@dataclass(frozen=True)
class DataConfig:
    """Which images or features, at what size, and which of the training classes validate."""

    name: DatasetName = "glyphs"
    path: str = ""
    """Folder (`folder`) or .npz file (`features`) of the user's own data; the other data sets live in the data root."""
    image_size: int = 32
    """Side of the square that images are squashed to when they are decoded; the authors' 256 [c]."""
    crop_size: int = 28
    """Side of the random crop in training and of the centre crop in evaluation; the authors' 227 [c]."""
    flip: bool = False
    """Mirror half of the training images; a letter is another letter when mirrored, a bird is not."""
    batch_size: int = 64
    """Rows of a batch: pairs of n classes, or triplets (a third each of anchors, positives, negatives)."""
    folds: int = 5
    """Into how many class-disjoint folds the training classes are cut; the paper's 5 [m]."""
    fold: int = 0
    """The fold that validates; the other folds train."""
    disjoint_by: Literal["character", "alphabet"] = "character"
    """What train and test share nothing of on `omniglot`; the other data sets are disjoint by class."""
    feature_crops: int = 1
    """Views of each training image in the cache of a frozen extractor: the centre crop, then random ones."""
    resident: bool = True
    """Keep the rows of the training classes on the GPU where they fit beside what trains: bitwise the same, and no step
    waits for them."""

    def __post_init__(self) -> None:
        _check_types(self, "data.")
        _need(self.image_size >= 8, "data.image_size", ">= 8", self.image_size)
        _need(
            8 <= self.crop_size <= self.image_size,
            "data.crop_size",
            f"in [8, data.image_size = {self.image_size}]",
            self.crop_size,
        )
        _need(self.batch_size >= 4, "data.batch_size", ">= 4", self.batch_size)
        _need(self.folds >= 2, "data.folds", ">= 2", self.folds)
        _need(0 <= self.fold < self.folds, "data.fold", f"in [0, data.folds = {self.folds})", self.fold)
        _need(self.feature_crops >= 1, "data.feature_crops", ">= 1", self.feature_crops)


@dataclass(frozen=True)
class NetworkConfig:
    """The extractor f, the embedder g and the generator i; the head follows from the classes."""

    extractor: ExtractorName = "convnet"
    weights: str = ""
    """Empty: random. Otherwise a torchvision weights name (IMAGENET1K_V1) or the path of a safetensors state dict."""
    frozen: str = ""
    """What of f is never trained, its output extracted once and cached: nothing (empty), `all` of it, or a layer of the
    torchvision network, as `layer3`, with all that comes before it."""
    batch_norm: Literal["trained", "frozen"] = "trained"
    """Whether the extractor's batch norm layers learn and take batch statistics, or stay as the weights have them."""
    embedding_size: int = 64
    """Size d of z. 512 in the paper [s]; 128 (Cars196), 256 (CUB), 512 (SOP) in the authors' code [c]."""
    embedder_batch_norm: bool = False
    """Batch norm on y before the fully connected layer of g: in the authors' code, not in the paper [c]."""
    generator_hidden: int = 512
    """Hidden units of the generator [c]."""

    def __post_init__(self) -> None:
        _check_types(self, "network.")
        _need(self.embedding_size >= 1, "network.embedding_size", ">= 1", self.embedding_size)
        _need(self.generator_hidden >= 1, "network.generator_hidden", ">= 1", self.generator_hidden)


@dataclass(frozen=True)
class LossConfig:
    """The metric loss J(T) of a tuple."""

    name: str = "npair"
    """A loss of tuples, or `pml.NAME`, a loss of pytorch-metric-learning such as `pml.ProxyAnchorLoss`."""
    margin: float = 1.0
    """Margin of triplet, semihard, lifted and contrastive (there of the negative pairs)."""
    l2_reg: float = 0.0
    """N-pair and angular: weight of the squared norms of the embeddings; 3e-3 or 1.5e-2 in the authors' code [c]."""
    angle: float = 40.0
    """Angular loss: its angle in degrees."""
    threshold: float = 3.0
    """DDML: the squared distance tau that parts the positive pairs from the negative ones [m]."""
    sharpness: float = 10.0
    """DDML: the b of its logistic loss; the larger, the nearer to a hinge [m]."""
    options: str = ""
    """Of a loss of pytorch-metric-learning: numbers by keyword, as `alpha=2, beta=50`; the rest are its defaults."""

    def __post_init__(self) -> None:
        _check_types(self, "loss.")
        if self.name.startswith("pml."):
            from hdml_core.library_losses import check_library_loss

            check_library_loss(self.name, self.options)
        elif self.name not in get_args(MetricLossName):
            known = get_args(MetricLossName)
            rule = f"one of {', '.join(map(repr, known))}, or 'pml.NAME' for a loss of pytorch-metric-learning"
            raise ConfigError(f"loss.name must be {rule}, got {self.name!r}{did_you_mean(self.name, known)}")
        _need(0 <= self.margin < math.inf, "loss.margin", ">= 0", self.margin)
        _need(0 <= self.l2_reg < math.inf, "loss.l2_reg", ">= 0", self.l2_reg)
        _need(0 < self.angle < 90, "loss.angle", "in (0, 90)", self.angle)
        _need(0 <= self.threshold < math.inf, "loss.threshold", ">= 0", self.threshold)
        _need(0 < self.sharpness < math.inf, "loss.sharpness", "> 0", self.sharpness)


@dataclass(frozen=True)
class HdmlConfig:
    """What hardness-aware synthesis adds to a metric loss."""

    alpha: float = 90.0
    """Pulling factor in exp(-alpha / J_avg), Eq. (7): 90 for N-pair [c], 7 for triplet [s]; 0 never pulls."""
    beta: float = 1e4
    """Balance factor in exp(-beta / J_gen), Eq. (11) [c]; 0 trains on real tuples alone."""
    lambda_soft: float = 1.0
    """Weight of J_soft in J_gen, Eq. (9). The authors' 1e4 * lambda_bal [c]."""
    recon_weight: float = 1.0
    """Weight of J_recon in J_gen: 1 in Eq. (9), the authors' 1 - lambda_bal [c]."""
    recon_reduction: Literal["mean", "sum"] = "mean"
    """Over the rows of a batch: mean makes J_gen free of the batch size, sum is the authors' [c]."""
    generated_roles: Literal["negative", "all"] = "negative"
    """Which parts of the synthetic tuple pass the generator: the paper keeps the real anchor and positive [m]."""
    average_of: Literal["j_m", "weighted_j_m"] = "j_m"
    """What J_avg averages: the raw metric loss, or the authors' exp(-beta / J_gen) (J_m + weight decay) [c]."""
    average_window: int = 0
    """Steps of the tumbling windows of J_avg and J_gen; 0 is one epoch (the paper), 64 the authors' [c]."""
    average_start: float = math.inf
    """J_avg and J_gen before the first window closes: infinity gives kept = w_real = 1; the authors' 1e6 [c]."""
    weight_decay_in_j_m: bool = False
    """True: optim.weight_decay is added into J_m and so scaled by w_real and averaged in J_avg, as the authors do [c];
    False: it is the optimiser's."""

    def __post_init__(self) -> None:
        _check_types(self, "hdml.")
        for name in ("alpha", "beta", "lambda_soft", "recon_weight"):
            value = getattr(self, name)
            _need(0 <= value < math.inf, f"hdml.{name}", ">= 0", value)
        _need(self.average_window >= 0, "hdml.average_window", ">= 0", self.average_window)
        _need(self.average_start > 0, "hdml.average_start", "> 0", self.average_start)


@dataclass(frozen=True)
class DamlConfig:
    """What deep adversarial metric learning adds to a metric loss."""

    lambda_reg: float = 1.0
    """Weight of J_reg in J_gen [m]."""
    lambda_adv: float = 50.0
    """Weight of J_adv in J_gen [m]."""
    margin: float = 1.0
    """By how much a synthetic negative is to stay farther from the anchor than the positive, squared, in J_adv [m]."""
    pretrain_share: float = 0.5
    """Share of the epochs, rounded down, in which the plain metric loss trains before the generator joins in; that it
    does is from the paper [m], how long is not known."""

    def __post_init__(self) -> None:
        _check_types(self, "daml.")
        for name in ("lambda_reg", "lambda_adv", "margin"):
            value = getattr(self, name)
            _need(0 <= value < math.inf, f"daml.{name}", ">= 0", value)
        _need(0 <= self.pretrain_share < 1, "daml.pretrain_share", "in [0, 1)", self.pretrain_share)


@dataclass(frozen=True)
class OptimConfig:
    """Three Adam optimisers over three networks: the metric (f and g), the generator, the head."""

    epochs: int = 8
    steps_per_epoch: int = 0
    """0: as many as it takes to draw as many rows as the training set has."""
    lr_extractor: float = 1e-3
    lr_embedder: float = 1e-3
    """In the paper ten times that of the extractor [m]; in the authors' code the same [c]."""
    lr_generator: float = 1e-3
    lr_head: float = 1e-3
    lr_loss: float = 1e-2
    """Of what a loss of pytorch-metric-learning learns itself, such as proxies; they do not decay."""
    weight_decay: float = 0.0
    """Of f and g, as 0.5 * weight_decay * sum of squares; batch norm is exempt [c]. See hdml.weight_decay_in_j_m."""
    clip: float = math.inf
    """Every gradient element is clipped to +-clip; the authors' 2 on SOP [c]."""
    halve_at: tuple[int, ...] = ()
    """Steps at which the learning rates halve; the authors' 5632 and 6848 [c]."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16: automatic mixed precision in the forward pass."""
    channels_last: bool = False
    compile: bool = False
    """Compile the objective of a method with synthesis; the plain loss has nothing to gain."""

    def __post_init__(self) -> None:
        _check_types(self, "optim.")
        _need(self.epochs >= 1, "optim.epochs", ">= 1", self.epochs)
        _need(self.steps_per_epoch >= 0, "optim.steps_per_epoch", ">= 0", self.steps_per_epoch)
        for name in ("lr_extractor", "lr_embedder", "lr_generator", "lr_head", "lr_loss", "weight_decay"):
            value = getattr(self, name)
            _need(0 <= value < math.inf, f"optim.{name}", ">= 0", value)
        _need(self.clip > 0, "optim.clip", "> 0", self.clip)
        _need(all(step > 0 for step in self.halve_at), "optim.halve_at", "steps > 0", self.halve_at)


@dataclass(frozen=True)
class RetrievalConfig:
    """What retrieval is measured, and how."""

    ks: tuple[int, ...] = (1, 2, 4, 8)
    """K of Recall@K: 1, 2, 4, 8; on SOP 1, 10, 100."""
    clusterings: int = 3
    """Runs of k-means, each from another seed; NMI and F1 are their means, and their spread is reported."""

    def __post_init__(self) -> None:
        _check_types(self, "retrieval.")
        ascending = len(self.ks) > 0 and all(a < b for a, b in zip((0, *self.ks), self.ks, strict=False))
        _need(ascending, "retrieval.ks", "ascending and >= 1", self.ks)
        _need(self.clusterings >= 1, "retrieval.clusterings", ">= 1", self.clusterings)


@dataclass(frozen=True)
class Config:
    """A whole run. Two equal configs give bitwise equal runs on the same device."""

    recipe: Literal["paper", "authors"] = "paper"
    """Where the defaults came from. The settings themselves are all in the sections."""
    seed: int = 0
    synthesis: SynthesisName = "hdml"
    """Where synthetic negatives come from; none: the metric loss of real tuples alone."""
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    hdml: HdmlConfig = field(default_factory=HdmlConfig)
    daml: DamlConfig = field(default_factory=DamlConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)

    def __post_init__(self) -> None:
        _check_types(self, "")
        _need(self.seed >= 0, "seed", ">= 0", self.seed)
        rows = 3 if self.loss.name == "triplet" else 2
        rule = f"a multiple of {rows} for loss.name = {self.loss.name!r}"
        _need(self.data.batch_size % rows == 0, "data.batch_size", rule, self.data.batch_size)
        if self.loss.name.startswith("pml."):
            rule = f"'none' for loss.name = {self.loss.name!r}, which has no tuples to make synthetic negatives of"
            _need(self.synthesis == "none", "synthesis", rule, self.synthesis)


def to_settings(config: Config) -> dict[str, Setting]:
    """The tree as one flat dict of dotted names, in the order of the tree.

    >>> to_settings(Config())["hdml.alpha"]
    90.0
    """
    flat: dict[str, Setting] = {}
    for name, value in asdict(config).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": leaf for inner, leaf in value.items()}
        else:
            flat[name] = value
    return flat


# What each loss reads of its section beside its name.
_LOSS_READS: Mapping[str, tuple[str, ...]] = {
    "npair": ("l2_reg",),
    "triplet": ("margin",),
    "contrastive": ("margin",),
    "semihard": ("margin",),
    "lifted": ("margin",),
    "angular": ("angle", "l2_reg"),
    "ddml": ("threshold", "sharpness"),
    "pml": ("options",),
}


def idle(config: Config) -> frozenset[str]:
    """Return the dotted names of the settings that nothing reads in this run: whatever their value, it is the same.

    What decides is the method, the loss, the data set and what of f is frozen, never the value of a number.

    >>> sorted(name for name in idle(Config()) if name.startswith("loss."))
    ['loss.angle', 'loss.margin', 'loss.options', 'loss.sharpness', 'loss.threshold']
    """
    data, network, loss = config.data, config.network, config.loss.name.partition(".")[0]
    features = data.name == "features"
    names: set[str] = set()
    if config.synthesis != "hdml":
        names |= _names("hdml") - {"hdml.weight_decay_in_j_m"}
        names |= {"optim.lr_head"}
    if config.synthesis != "daml":
        names |= _names("daml")
    if config.synthesis == "none":
        names |= {"network.generator_hidden", "optim.lr_generator", "optim.compile"}
    names |= _names("loss") - {"loss.name", *(f"loss.{name}" for name in _LOSS_READS[loss])}
    if loss != "pml":
        names |= {"optim.lr_loss"}
    if features:
        names |= {"data.image_size", "data.crop_size", "data.flip"}
        names |= {"network.extractor", "network.weights", "network.frozen"}
    if features or network.frozen == "all":
        names |= {"network.batch_norm", "optim.lr_extractor", "optim.channels_last"}
    if features or not network.frozen:
        names |= {"data.feature_crops"}
    if data.name not in ("folder", "features"):
        names |= {"data.path"}
    if data.name != "omniglot":
        names |= {"data.disjoint_by"}
    return frozenset(names)


def _names(section: str) -> set[str]:
    return {name for name in to_settings(Config()) if name.startswith(f"{section}.")}


def with_settings(config: Config, settings: Settings) -> Config:
    """A copy with some dotted names set.

    >>> with_settings(Config(), {"hdml.alpha": 7.0}).hdml.alpha
    7.0

    Raises ConfigError for an unknown name (with the nearest known one), a wrong type or a value out of range.
    """
    by_section: dict[str, dict[str, Setting]] = {}
    for name, value in settings.items():
        _check_name(name)
        section, _, leaf = name.rpartition(".")
        by_section.setdefault(section, {})[leaf] = value
    changes: dict[str, Any] = dict(by_section.pop("", {}))
    for section, leaves in by_section.items():
        changes[section] = replace(getattr(config, section), **leaves)
    return replace(config, **changes)


def parse_setting(assignment: str) -> tuple[str, Setting]:
    """Read "dotted.name=value" by the type that the name declares; whole numbers do for floats here.

    >>> parse_setting("hdml.alpha=7")
    ('hdml.alpha', 7.0)
    >>> parse_setting("retrieval.ks=1,10,100")
    ('retrieval.ks', (1, 10, 100))
    """
    name, equals, text = assignment.partition("=")
    _need(bool(equals), "a setting", "written dotted.name=value", assignment)
    _check_name(name)
    section, _, leaf = name.rpartition(".")
    owner = get_type_hints(Config)[section] if section else Config
    hint = get_type_hints(owner)[leaf]
    try:
        if hint is bool:
            return name, {"true": True, "false": False}[text.lower()]
        if get_origin(hint) is tuple:
            return name, tuple(int(part) for part in text.split(",") if part)
        if get_origin(hint) is Literal:
            return name, text
        return name, hint(text)
    except (ValueError, KeyError) as error:
        words = {bool: "true or false", tuple: "whole numbers with commas between"}
        wanted = words.get(get_origin(hint) or hint, f"of type {hint.__name__}")
        raise ConfigError(f"{name} must be {wanted}, got {text!r}") from error


def _check_name(name: str) -> None:
    known = list(to_settings(Config()))
    if name in known:
        return
    section, _, leaf = name.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    if not siblings:
        sections = [part.name for part in fields(Config) if is_dataclass(get_type_hints(Config)[part.name])]
        hint = did_you_mean(section, sections) or did_you_mean(name, known)
        raise ConfigError(f"unknown setting {name!r}: the sections are [{', '.join(sections)}]{hint}")
    hint = did_you_mean(leaf, siblings)
    where = section or "Config"
    raise ConfigError(f"unknown setting {name!r}: {where} has [{', '.join(siblings)}]{hint}")


# What each recipe changes of the defaults above, which are the paper's on a small network.
RECIPES: Mapping[str, Settings] = {
    "paper": {},
    "authors": {
        "network.embedder_batch_norm": True,
        "hdml.lambda_soft": 5e3,
        "hdml.recon_weight": 0.5,
        "hdml.recon_reduction": "sum",
        "hdml.generated_roles": "all",
        "hdml.average_of": "weighted_j_m",
        "hdml.average_window": 64,
        "hdml.average_start": 1e6,
        "hdml.weight_decay_in_j_m": True,
    },
}

# What the data themselves ask for, whichever the recipe. Epochs are for studies; a published run has its steps.
_PHOTOGRAPHS: Settings = {
    "data.image_size": 256,
    "data.crop_size": 227,
    "data.flip": True,
    "data.batch_size": 128,
    "network.extractor": "googlenet",
    "network.weights": "IMAGENET1K_V1",
    "optim.epochs": 40,
}
DATA_SETTINGS: Mapping[str, Settings] = {
    "glyphs": {"optim.epochs": 6, "optim.channels_last": True},
    "omniglot": {"optim.epochs": 20, "optim.channels_last": True},
    "cub200": _PHOTOGRAPHS,
    "cars196": _PHOTOGRAPHS,
    "sop": {**_PHOTOGRAPHS, "retrieval.ks": (1, 10, 100)},
    "folder": _PHOTOGRAPHS,
    "features": {},
}

_PAPER_PHOTOGRAPHS: Settings = {
    "network.embedding_size": 512,
    "optim.lr_extractor": 1e-4,
    "optim.lr_embedder": 1e-3,
    "optim.lr_generator": 1e-3,
    "optim.lr_head": 1e-3,
}
_AUTHORS_PHOTOGRAPHS: Settings = {
    "optim.lr_generator": 1e-2,
    "optim.lr_head": 1e-3,
    "optim.halve_at": (5632, 6848),
}

# What a recipe states for a data set: the table of section 4 of the authors' flags [c], the paper's text [s][m].
RECIPE_DATA_SETTINGS: Mapping[tuple[str, str], Settings] = {
    ("paper", "cub200"): _PAPER_PHOTOGRAPHS,
    ("paper", "cars196"): _PAPER_PHOTOGRAPHS,
    ("paper", "sop"): _PAPER_PHOTOGRAPHS,
    ("paper", "folder"): _PAPER_PHOTOGRAPHS,
    ("authors", "cars196"): {
        **_AUTHORS_PHOTOGRAPHS,
        "network.embedding_size": 128,
        "optim.weight_decay": 5e-3,
        "optim.lr_extractor": 7e-5,
        "optim.lr_embedder": 7e-5,
        "loss.l2_reg": 3e-3,
        "hdml.beta": 1e4,
    },
    ("authors", "cub200"): {
        **_AUTHORS_PHOTOGRAPHS,
        "network.embedding_size": 256,
        "optim.weight_decay": 1e-3,
        "optim.lr_extractor": 6e-5,
        "optim.lr_embedder": 6e-5,
        "loss.l2_reg": 1.5e-2,
        "hdml.beta": 5e3,
    },
    ("authors", "sop"): {
        "network.embedding_size": 512,
        "optim.weight_decay": 9e-3,
        "optim.lr_extractor": 2e-5,
        "optim.lr_embedder": 2e-5,
        "optim.lr_generator": 5e-4,
        "optim.lr_head": 1e-3,
        "optim.clip": 2.0,
        "loss.l2_reg": 3e-3,
        "hdml.beta": 5e4,
    },
}

# What a loss asks for: the published alpha of its HDML, and a batch of whole tuples (120 for triplets [s]).
LOSS_SETTINGS: Mapping[str, Settings] = {
    "triplet": {"hdml.alpha": 7.0, "data.batch_size": 60},
}
LOSS_DATA_SETTINGS: Mapping[tuple[str, str], Settings] = {
    **{("triplet", name): {"data.batch_size": 120} for name in ("cub200", "sop", "folder")},
    # Of 98 classes that train a fold leaves 78, which are too few for the published 40 triplets of two classes each.
    ("triplet", "cars196"): {"data.batch_size": 114},
}


def recipe_config(settings: Settings) -> Config:
    """The run that these settings describe: recipe, data set and loss choose the defaults, the rest overrides them.

    >>> recipe_config({"recipe": "authors", "data.name": "cub200"}).optim.lr_extractor
    6e-05
    >>> recipe_config({"loss.name": "triplet"}).hdml.alpha
    7.0
    """
    choosing = ("recipe", "synthesis", "data.name", "loss.name", "loss.options")
    choices = {name: settings[name] for name in choosing if name in settings}
    chosen = with_settings(Config(), {"data.batch_size": 6, **choices})
    recipe, data, loss = chosen.recipe, chosen.data.name, chosen.loss.name
    layers = [
        RECIPES[recipe],
        DATA_SETTINGS[data],
        RECIPE_DATA_SETTINGS.get((recipe, data), {}),
        LOSS_SETTINGS.get(loss, {}),
        LOSS_DATA_SETTINGS.get((loss, data), {}),
        settings,
    ]
    return with_settings(Config(), {name: value for layer in layers for name, value in layer.items()})
