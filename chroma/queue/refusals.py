"""One line for what a ComfyUI server says against a workflow."""

import difflib
from typing import Any

SHOWN_CHOICES = 8
LONGEST = 400
ADVICE = {
    "value_not_in_list": "choose one of these, or put the file into the server's folder",
    "missing_node_type": "install the pack that has it on the server",
    "prompt_no_outputs": "add a SaveImage node",
}


def one_line(text: Any) -> str:
    """Text without line breaks, cut to a length that still reads."""
    line = " ".join(str(text).split())
    return line if len(line) <= LONGEST else line[:LONGEST] + "..."


def node_label(prompt: dict[str, Any], node_id: str) -> str:
    """A node as "node 3 'Title' (Class)"."""
    node = prompt.get(node_id, {})
    title = node.get("_meta", {}).get("title", "")
    shown = f" '{title}'" if title else ""
    return f"node {node_id}{shown} ({node.get('class_type', 'unknown')})"


def refusal(reply: dict[str, Any], prompt: dict[str, Any]) -> str:
    """The first error in a reply to POST /prompt and the number of the others; "" for none."""
    found = [
        (f"{node_label(prompt, node_id)}, {_complaint(error)}", error)
        for node_id, node in (reply.get("node_errors") or {}).items()
        for error in node.get("errors", [])
    ]
    if not found and (error := reply.get("error")):
        error = error if isinstance(error, dict) else {"message": error}
        found = [(_complaint(error), error)]
    if not found:
        return ""
    line, error = found[0]
    if advice := ADVICE.get(error.get("type", "")):
        line += f"; {advice}"
    return line + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")


def _complaint(error: dict[str, Any]) -> str:
    info = error.get("extra_info") or {}
    if error.get("type") == "value_not_in_list" and (choices := _choices(info.get("input_config"))):
        value = info.get("received_value")
        near = difflib.get_close_matches(str(value), choices, SHOWN_CHOICES)
        shown = [*near, *(c for c in choices if c not in near)][:SHOWN_CHOICES]
        more = len(choices) - len(shown)
        names = ", ".join(shown) + (f" and {more} more" if more else "")
        return one_line(f"input {info.get('input_name')}: the server has no {value!r}, but {names}")
    message, details = error.get("message", "refused"), error.get("details", "")
    if error.get("type") == "custom_validation_failed":
        # "input - reason", where the node has written the reason.
        name, _, reason = str(details).partition(" - ")
        return one_line(f"input {name}: {reason or message}")
    return one_line(f"{message}: {details}" if details and details != message else message)


def _choices(config: Any) -> list[str]:
    """The menu in an input's description: `[[...], {}]`, or `["COMBO", {"options": [...]}]`."""
    if not isinstance(config, list | tuple) or not config:
        return []
    if isinstance(config[0], list):
        return [str(choice) for choice in config[0]]
    options = config[1].get("options") if len(config) > 1 and isinstance(config[1], dict) else None
    return [str(choice) for choice in options or []]
