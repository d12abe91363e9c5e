"""Choices in menus, which ComfyUI up to 0.7 does not check for nodes written like ours."""

import inspect
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io


def wrong_choice(node: type[io.ComfyNode], values: Mapping[str, Any]) -> str | None:
    """One line on the first value that its menu does not have.

    A value of None comes over a link and is not known yet.
    """
    for menu in _menus(node):
        value, known = values.get(menu.id), list(menu.options or ())
        if value is not None and value not in known:
            shown = ", ".join(map(str, known[:10])) + (", ..." if len(known) > 10 else "")
            return f"{menu.id} {value!r} is not in the list; expected one of {shown}"
    return None


def comfyui_checks_menus() -> bool:
    """Whether ComfyUI looks at new-style menus itself: it then names their type."""
    import execution

    code = getattr(inspect.unwrap(execution.validate_inputs), "__code__", None)
    return code is not None and "Combo" in code.co_names


def checks_menus(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, with its menus checked before it is queued where ComfyUI does not.

    Not everywhere, since ComfyUI repeats a node's complaint for every input that was looked at.
    """
    menus = [menu.id for menu in _menus(node)]
    if comfyui_checks_menus() or not menus:
        return node
    own = vars(node).get("validate_inputs")
    others = list(inspect.signature(own.__func__).parameters)[1:] if own else []

    def validate_inputs(cls, **values: Any) -> bool | str:
        wrong = wrong_choice(cls, values)
        if wrong is None and own:
            return own.__func__(cls, **{name: values.get(name) for name in others})
        return wrong or True

    # ComfyUI hands over the inputs that it reads here, and leaves their other checks to the node.
    names = ["cls", *dict.fromkeys([*menus, *others])]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in names]
    validate_inputs.__signature__ = inspect.Signature(parameters)  # pyright: ignore
    node.validate_inputs = classmethod(validate_inputs)
    return node


def _menus(node: type[io.ComfyNode]) -> list[io.Combo.Input]:
    return [one for one in node.define_schema().inputs or () if isinstance(one, io.Combo.Input)]
