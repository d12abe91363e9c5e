"""The options of schedules, with their ranges and advice."""

from ..chroma.option import Option, Options

OPTIONS: Options = {
    "beta": (
        Option(
            "alpha", 0.6, 0.01, 50.0,
            "Shape at the clean end: smaller puts more steps at low sigma. 0.6 is usual, 0.4 an "
            "alternative.",
        ),
        Option(
            "beta", 0.6, 0.01, 50.0,
            "Shape at the noisy end: smaller puts more steps at high sigma. 0.6 is usual, 0.4 an "
            "alternative.",
        ),
    ),
    "sigmoid_offset": (
        Option(
            "square_k", 1.0, 0.01, 10.0,
            "Steepness: larger puts more steps at both ends, fewer in between.",
        ),
        Option(
            "base_c", 0.5, 0.0, 1.0,
            "Offset: below 0.5 more steps at high sigma (composition), above it more at low sigma "
            "(detail).",
        ),
    ),
    "power_odds": (
        Option(
            "p", 2.0, 0.25, 4.0, "Larger takes smaller steps near the end."
        ),
        Option(
            "a", 4.0, 0.01, 100.0,
            "Larger spends more steps at high noise. Best: 4 on a trained model, 8 on known flows.",
        ),
    ),
    "bong_tangent": (
        Option(
            "pivot_1", 0.6, 0.0, 1.0, "Larger spends more steps above the middle, first part."
        ),
        Option("pivot_2", 0.6, 0.0, 1.0, "Larger spends more steps above the middle, second part."),
        Option("slope_1", 0.2, 0.01, 1.0, "Larger passes the middle faster, first part."),
        Option("slope_2", 0.2, 0.01, 1.0, "Larger passes the middle faster, second part."),
        Option("middle", 0.5, 0.05, 0.95, "The sigma at which both parts meet."),
    ),
    "linear_quadratic": (
        Option(
            "threshold_noise", 0.025, 0.001, 0.5,
            "How far the first half of the steps goes down. Avoid below about 20 steps.",
        ),
    ),
}  # fmt: skip
