"""Write torchvision's ResNet weights under detectron2's names.

    kd-convert resnet --architecture resnet18 --output pretrained/resnet18_torchvision.pth
    kd-convert resnet --architecture resnet18 --weights resnet18-f37072fd.pth --output OUTPUT

detectron2's zoo has ImageNet weights of ResNet-50 and deeper, torchvision of ResNet-18 and 34 too.
Without ``--weights`` torchvision downloads its own ImageNet weights. A config that starts from the
result needs RGB images with torchvision's statistics, and strides where torchvision has them::

    MODEL:
      WEIGHTS: "pretrained/resnet18_torchvision.pth"
      PIXEL_MEAN: [123.675, 116.28, 103.53]
      PIXEL_STD: [58.395, 57.12, 57.375]
      RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, STRIDE_IN_1X1: False}
    INPUT:
      FORMAT: "RGB"

``RES2_OUT_CHANNELS: 64`` is for depths 18 and 34 only.
"""

from __future__ import annotations

import os

import torch
import torchvision

from ...arguments import Parser, output_file
from ...errors import ConfigError
from ...files import resolve_weights
from ...modeling.resnet_names import detectron2_name
from ...weights.files import read_torch_file

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def convert(state: dict[str, torch.Tensor], architecture: str) -> dict:
    """A checkpoint that detectron2 loads into any detector with this ResNet.

    Args:
        state: state dict of ``torchvision.models.<architecture>``.
        architecture: one of ``ARCHITECTURES``.

    Raises:
        ConfigError: the tensors are not those of the architecture.
    """
    with torch.device("meta"):
        expected = torchvision.models.get_model(architecture, weights=None).state_dict()
    tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
    wrong = [
        name
        for name, value in expected.items()
        if detectron2_name(name) is not None
        and (name not in tensors or tensors[name].shape != value.shape)
    ]
    wrong += [name for name in state if name not in expected]
    if wrong:
        raise ConfigError(
            f"--weights: not a state dict of torchvision's {architecture}: "
            f"{', '.join(wrong[:3])}{' ...' if wrong[3:] else ''}"
        )
    renamed = {detectron2_name(name): value.float() for name, value in tensors.items()}
    renamed.pop(None, None)
    # names are matched by their ends: "backbone.bottom_up." in FPN detectors, "backbone." in others
    return {"model": renamed, "matching_heuristics": True, "__author__": "torchvision"}


def read_state(architecture: str, path: str) -> dict:
    """The state dict in ``path``, or torchvision's ImageNet weights where that is empty."""
    if path:
        state = read_torch_file(resolve_weights(path, "--weights"), "--weights")
        if not isinstance(state, dict):
            raise ConfigError(f"--weights: '{path}' does not hold a state dict")
        return state
    weights = torchvision.models.get_model_weights(architecture).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except OSError as error:
        raise ConfigError(
            f"{architecture}: '{os.path.basename(weights.url)}' could not be downloaded ({error}); "
            "fetch it elsewhere and name it with --weights"
        ) from error


def parse_arguments(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--architecture", required=True, choices=ARCHITECTURES)
    parser.add_argument("--output", type=output_file, required=True, help="file to write (.pth)")
    parser.add_argument("--weights", default="", help="file with torchvision's state dict")
    return parser.parse_args(argv)


def main(args) -> None:
    if not args.output.endswith(".pth"):
        raise ConfigError(f"--output: '{args.output}' must end in .pth")
    checkpoint = convert(read_state(args.architecture, args.weights), args.architecture)
    torch.save(checkpoint, args.output)
    print(f"{args.output}: {len(checkpoint['model'])} tensors")
