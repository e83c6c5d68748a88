"""Configuration of the model, its input, its loss and its optimizer.

The defaults are the paper's (Shi et al., AAAI 2020); `jobs/configs/` holds the presets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cvft.configuration import require

Precision = Literal["float32", "bfloat16"]
"""What the trunks compute in while training."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """From a JPEG to the network's input; stored in every checkpoint, because weights are worth nothing without it.

    Attributes:
        ground_size_px: Height and width of the ground panorama given to the network.
        aerial_size_px: Height and width of the aerial image given to the network.
        channel_order: Order of the channels that `mean` and the network's first layer expect.
        mean: Subtracted from each channel (0 to 255), in `channel_order`. The official red mean is 123.6.
        std: Each channel is divided by this after the subtraction, in `channel_order`.
        decode_profile: `exact` decodes fully and averages areas; `fast` uses the JPEG's own half-size decoding where it
            is large enough and interpolates linearly. They differ by about 1.7 grey levels. `preresized` takes the
            images of a dataset that was sharded at exactly these sizes as they are.
        polar: The network unrolls the aerial image about its middle to the ground image's size before its first layer,
            see `cvft.polar_transform`.
    """

    ground_size_px: tuple[int, int] = (112, 616)
    aerial_size_px: tuple[int, int] = (256, 256)
    channel_order: Literal["rgb", "bgr"] = "bgr"
    mean: tuple[float, float, float] = (103.939, 116.779, 123.6)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    decode_profile: Literal["exact", "fast", "preresized"] = "exact"
    polar: bool = False

    @property
    def aerial_input_px(self) -> tuple[int, int]:
        """Height and width of what the aerial trunk sees."""
        return self.ground_size_px if self.polar else self.aerial_size_px

    def __post_init__(self) -> None:
        for name in ("ground_size_px", "aerial_size_px"):
            size = getattr(self, name)
            require(
                min(size) >= 16, f"{name}: {list(size)} is too small; the network halves it four times, use 16 or more"
            )
        require(min(self.std) > 0, f"std: {list(self.std)} must be positive")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The trunk of each view: our VGG, blocks of 3x3 convolutions with a max-pool between two blocks, or one of timm's.

    Attributes:
        kind: `vgg`, or `timm` for a network of that package (`pip install 'cvft[timm]'`), without its classifier.
        name: timm's name of the network, such as `convnext_base.fb_in22k_ft_in1k`; of `timm` alone, as the next four
            are of `vgg` alone.
        blocks: Number of convolutions in each block; VGG16 is (2, 2, 3, 3, 3) with four pools between them.
        width: Factor on VGG16's channel numbers (64, 128, 256, 512, 512).
        pooling: `ceil` is TensorFlow's "SAME" (39 columns from 616); `floor` is torchvision's.
        norm: `group` adds group normalisation after each convolution, which small networks trained from scratch need.
        num_frozen_blocks: The first blocks (for timm the first stages, as its `feature_info` counts them) that are not
            trained and run without autograd.
        dropout: Probability of dropping a value after each activation of the last two blocks while training; for timm,
            a value of the map.
        is_shared: One trunk for both views; the paper has two.
        weights: File or URL with the tensors to start from, torchvision's `features.*` or timm's of the same network;
            none means random weights.
    """

    kind: Literal["vgg", "timm"] = "vgg"
    name: str | None = None
    blocks: tuple[int, ...] = (2, 2, 3, 3, 3)
    width: float = 1.0
    pooling: Literal["ceil", "floor"] = "ceil"
    norm: Literal["none", "group"] = "none"
    num_frozen_blocks: int = 3
    dropout: float = 0.2
    is_shared: bool = False
    weights: str | None = None

    def __post_init__(self) -> None:
        require(1 <= len(self.blocks) <= 5, f"blocks: {list(self.blocks)} must hold one to five numbers")
        require(min(self.blocks) >= 1, f"blocks: {list(self.blocks)} must be at least 1 each")
        require(0 < self.width <= 4, f"width: {self.width} must lie in (0, 4]")
        frozen, blocks = self.num_frozen_blocks, len(self.blocks)
        require(
            frozen >= 0 and (frozen <= blocks or self.kind == "timm"),
            f"num_frozen_blocks: {frozen} must lie in [0, {blocks}], the number of blocks",
        )
        require(0 <= self.dropout < 1, f"dropout: {self.dropout} must lie in [0, 1)")
        require(self.kind == "timm" or self.name is None, f"name: {self.name} is of kind=timm; vgg has none")
        if self.kind == "timm":
            require(self.name is not None, "name: kind=timm needs timm's name of the network")
            for key, default in (("blocks", (2, 2, 3, 3, 3)), ("width", 1.0), ("pooling", "ceil"), ("norm", "none")):
                require(getattr(self, key) == default, f"{key}: {getattr(self, key)} is of kind=vgg; timm has its own")


@dataclass(frozen=True, kw_only=True)
class TransportConfig:
    """The transport layer: cost from the ground features, Sinkhorn, moved features.

    Attributes:
        init: Bias of the cost at the start. `identity` is the published one (staying in place is forbidden and, in
            float32, cannot be learned); `zero` starts from the uniform plan; `soft` leaves half of each mass in place,
            or, where the plan is rectangular, takes it to where stretching the ground's map over the grid takes it.
        epsilon: Entropic regularisation in units of cost; the paper multiplies costs by 100, which is 0.01.
        is_epsilon_learned: Train the logarithm of epsilon too, starting from `epsilon`; the paper does not.
        num_iterations: Sinkhorn rounds, each rows first and then columns.
        gradient: `unrolled` differentiates the rounds exactly; `implicit` assumes convergence and refuses without it.
        solver: `scaling` is the fast stabilised form, `triton` the same in one kernel each way, for CUDA; `log` is the
            plain loop in log space. `auto` takes `triton` wherever it can run, and `scaling` elsewhere.
        is_rectangular: Move features from the ground's own map (4x20 for the paper's input) straight to the aerial
            grid; without it the ground map is resized to that grid first, as the paper does.
        num_groups: Plans of an image; each moves its part of the channels.
        polar_weight: Add to the cost how far apart two positions lie where the panorama's row is taken for a distance
            and its column for a bearing, north in the middle (`cvft.polar_prior`). The weight where it starts, in units
            of epsilon per square of half the aerial image's width; it is learned. None adds nothing.
        dustbin_share: Share of the ground's mass that has no counterpart in the aerial image, such as the sky's: one
            more target takes it, at costs of its own. The share where it starts; it is learned. 0 is no dustbin.
    """

    init: Literal["identity", "zero", "soft"] = "identity"
    epsilon: float = 0.01
    is_epsilon_learned: bool = False
    num_iterations: int = 20
    gradient: Literal["unrolled", "implicit"] = "unrolled"
    solver: Literal["auto", "scaling", "log", "triton"] = "auto"
    is_rectangular: bool = False
    num_groups: int = 1
    polar_weight: float | None = None
    dustbin_share: float = 0.0

    def __post_init__(self) -> None:
        require(self.epsilon > 0, f"epsilon: {self.epsilon} must be positive")
        require(self.num_iterations >= 1, f"num_iterations: {self.num_iterations} must be at least 1")
        require(
            not (self.is_rectangular and self.init == "identity"),
            "init: identity has no meaning where the ground's positions are not the grid's (is_rectangular); "
            "use zero or soft",
        )
        require(self.num_groups >= 1, f"num_groups: {self.num_groups} must be at least 1")
        require(
            self.polar_weight is None or self.polar_weight >= 0,
            f"polar_weight: {self.polar_weight} must not be negative, or null for no prior",
        )
        require(0 <= self.dustbin_share < 1, f"dustbin_share: {self.dustbin_share} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """From the trunk's features to the descriptor.

    Attributes:
        kind: `cvft` moves ground features by transport; `conv` is the same without; `global_pool` is a global max-pool.
        channels: Output channels of the 3x3 convolution.
        stride: Of the 3x3 convolution; 2 is the paper's, 1 suits trunks that halve the image five times.
        grid: Rows and columns of the map that becomes the descriptor; the ground map is resized to it.
        transport: Used by `cvft` alone.
    """

    kind: Literal["cvft", "conv", "global_pool"] = "cvft"
    channels: int = 64
    stride: int = 2
    grid: tuple[int, int] = (8, 8)
    transport: TransportConfig = field(default_factory=TransportConfig)

    def __post_init__(self) -> None:
        require(self.channels >= 1, f"channels: {self.channels} must be at least 1")
        require(self.stride in (1, 2), f"stride: {self.stride} must be 1 or 2")
        require(min(self.grid) >= 1, f"grid: {list(self.grid)} must be at least 1 each")
        groups = self.transport.num_groups
        require(
            self.channels % groups == 0,
            f"channels: {self.channels} must be a multiple of transport.num_groups={groups}: each moves its part",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole network."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The training loss over all pairs of the global batch.

    Attributes:
        kind: `soft_margin_triplet` is the paper's weighted soft-margin triplet loss in both directions; `info_nce` is
            the symmetric cross entropy with a learned temperature.
        gamma: Steepness of the soft margin; used by `soft_margin_triplet` alone.
        temperature: Where the learned temperature starts; used by `info_nce` alone.
        label_smoothing: Share of the label that is spread over all references; used by `info_nce` alone.
        mask_distance_m: Negatives nearer than this to the query are left out; none keeps all (CVACT uses 25).
    """

    kind: Literal["soft_margin_triplet", "info_nce"] = "soft_margin_triplet"
    gamma: float = 10.0
    temperature: float = 0.07
    label_smoothing: float = 0.1
    mask_distance_m: float | None = None

    def __post_init__(self) -> None:
        require(self.gamma > 0, f"gamma: {self.gamma} must be positive")
        temperature, smoothing = self.temperature, self.label_smoothing
        require(0.01 <= temperature <= 1, f"temperature: {temperature} must lie in [0.01, 1], where it is kept")
        require(0 <= smoothing < 1, f"label_smoothing: {smoothing} must lie in [0, 1)")
        distance = self.mask_distance_m
        require(distance is None or distance > 0, f"mask_distance_m: {distance} must be positive, or null for no mask")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and the course of its learning rate.

    Attributes:
        kind: `adam` (the paper's) or `adamw`.
        learning_rate: At its highest point.
        weight_decay: Applied to matrices and kernels, never to biases.
        schedule: `constant` (the paper's) or `cosine`, down to zero over the whole training.
        warmup_fraction: Part of all steps over which the rate rises linearly from zero.
        max_gradient_norm: Gradients whose norm over all parameters is larger are scaled down to it; none never does.
    """

    kind: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_fraction: float = 0.0
    max_gradient_norm: float | None = None

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"learning_rate: {self.learning_rate} must be positive")
        require(self.weight_decay >= 0, f"weight_decay: {self.weight_decay} must not be negative")
        require(0 <= self.warmup_fraction < 1, f"warmup_fraction: {self.warmup_fraction} must lie in [0, 1)")
        norm = self.max_gradient_norm
        require(norm is None or norm > 0, f"max_gradient_norm: {norm} must be positive, or null for no limit")
