"""ComfyUI's own samplers, and a model as they take it."""

import torch
from comfy_inprocess import import_comfyui
from test_samplers import two_modes


class ComfyModel:
    """What ComfyUI's samplers take for a model; cond and uncond are functions of (x, sigma)."""

    def __init__(self, cond=two_modes, uncond=two_modes, scale=1.0, negative=True):
        import_comfyui()
        import comfy.model_sampling

        class Sampling(comfy.model_sampling.CONST):
            noise_scale = 1.0

            def percent_to_sigma(self, percent):
                return 1 - percent

        class Patcher:
            get_model_object = staticmethod(lambda name: Sampling())

        self.inner_model = type("Inner", (), {"model_patcher": Patcher})
        self.functions, self.scale, self.negative = (cond, uncond), scale, negative

    def __call__(self, x, sigma, model_options=None, seed=None):
        from comfy.samplers import cfg_function

        cond, uncond = (function(x, sigma) for function in self.functions)
        return cfg_function(
            self, cond, uncond if self.negative else torch.zeros_like(x), self.scale, x, sigma,
            model_options=model_options or {}, cond=[{}], uncond=[{}] if self.negative else None,
        )  # fmt: skip


def comfyui(name, model, x, sigmas, **options):
    """ComfyUI's sampler on `model`."""
    import_comfyui()
    import comfy.k_diffusion.sampling as theirs

    options.setdefault("extra_args", {})
    return getattr(theirs, f"sample_{name}")(model, x, sigmas, disable=True, **options)
