"""The options of samplers, with their ranges and advice."""

from ..chroma.option import Option, Options


def _eta(default: float) -> Option:
    return Option("eta", default, 0.0, 10.0, "Noise that each step adds anew: 0 none, 1 in full.")


S_NOISE = Option("s_noise", 1.0, 0.0, 10.0, "Factor on the noise that steps add.")
C2 = Option("c2", 0.5, 0.01, 1.0, "Where in a step its inner model call lies: 0.5 the middle.")

# All options of every sampler that has any beside eta and s_noise.
OPTIONS: Options = {
    "flow_pec": (
        Option(
            "order", 0, 0, 3,
            "2 or 3; 0 chooses: 3 from 24 steps on. 3 is more exact with many steps.",
        ),
        Option(
            "kappa", 0.0, 0.0, 100.0,
            "How far a step may extrapolate, 1 and more: 1 not at all. 0 chooses by the order.",
        ),
        _eta(0.0),
        S_NOISE,
    ),
    "flash": (
        Option(
            "substeps", 1, 1, 2,
            "Model calls a step: 1 is flow_pec, 2 a Runge-Kutta method at twice the time.",
        ),
    ),
    "sa_solver": (
        _eta(1.0),
        S_NOISE,
        Option("predictor_order", 3, 1, 4, "Last pictures that a step is predicted from."),
        Option(
            "corrector_order", 4, 0, 4,
            "Pictures that the step before is corrected with; 0 leaves it as predicted.",
        ),
    ),
    "deis": (
        Option("order", 3, 1, 4, "Last directions that a step uses. 1 is euler, 3 is usual."),
    ),
    "gradient_estimation": (
        Option(
            "ge_gamma", 1.5, 0.0, 5.0,
            "How far a step looks ahead: 1 is euler, 1.5 of second order, 2 more contrast.",
        ),
    ),
    "res_2s": (_eta(0.5), S_NOISE, C2),
    "res_2s_ode": (C2,),
    "dpmpp_sde": (
        _eta(1.0),
        S_NOISE,
        Option("r", 0.5, 0.01, 1.0, "Where in a step its inner model call lies: 0.5 the middle."),
    ),
}  # fmt: skip
