"""Where ComfyUI's menu of nodes has them."""

MAIN = "Chroma"
GUIDANCE = f"{MAIN}/guidance"
LORA = f"{MAIN}/LoRA"
PROMPT = f"{MAIN}/prompt"
SAMPLERS = f"{MAIN}/samplers"
SCHEDULERS = f"{MAIN}/schedulers"
TOOLS = f"{MAIN}/tools"
