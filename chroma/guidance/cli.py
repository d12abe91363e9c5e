"""Guidance on a command line."""

import argparse

from .plan import CURVES, Guidance


def add_guidance_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every option of Guidance but `cfg`; their defaults change nothing."""
    group = parser.add_argument_group("guidance")
    group.add_argument(
        "--cfg-curve",
        default="constant",
        choices=tuple(CURVES),
        help="how the scale goes from --cfg at sigma 1 to --cfg-end at sigma 0",
    )
    group.add_argument("--cfg-end", type=float, default=1.0, metavar="CFG")
    group.add_argument(
        "--cfg-interval",
        type=float,
        nargs=2,
        default=(1.0, 0.0),
        metavar=("START", "END"),
        help="sigmas between which there is guidance; outside, a step is one pass, not two",
    )
    group.add_argument(
        "--cfg-rescale", type=float, default=0.0, metavar="SHARE", help="0 to 1, against burn-in"
    )
    group.add_argument("--zero-star", action="store_true", help="CFG-Zero*: project the negative")
    group.add_argument(
        "--zero-init", type=int, default=0, metavar="STEPS", help="first steps to leave out"
    )
    group.add_argument(
        "--apg-eta",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="0 to 1: what stays of guidance along the prediction, against oversaturation",
    )
    group.add_argument(
        "--apg-norm",
        type=float,
        default=0.0,
        metavar="NORM",
        help="longest guidance over a whole latent; 0 for no limit",
    )
    group.add_argument(
        "--apg-momentum", type=float, default=0.0, metavar="SHARE",
        help="between -1 and 1: the last step's guidance that is added, usually negative",
    )  # fmt: skip


def guidance_from(args: argparse.Namespace) -> Guidance:
    """The Guidance of parsed arguments, `args.cfg` among them.

    Raises SamplingError for values that cannot be used.
    """
    start, end = args.cfg_interval
    return Guidance(
        args.cfg, args.cfg_curve, args.cfg_end, start, end, args.cfg_rescale, args.zero_star,
        args.zero_init, args.apg_eta, args.apg_norm, args.apg_momentum,
    )  # fmt: skip
