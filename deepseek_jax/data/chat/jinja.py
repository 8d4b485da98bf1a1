"""Our templates as Jinja text for chat_template.jinja, so that other software writes the prompts a model was tuned on.

They write what `Template.encode` does, in the environment that transformers gives to templates: `messages`, `tools`,
`bos_token`, `eos_token`, `add_generation_prompt` and, for models with thoughts, `thinking`.
"""

from deepseek_jax.data.chat.plain import CODER_SYSTEM

NAME = "chat_template.jinja"

PLAIN = """
{{- bos_token -}}
«SYSTEM»{{- ns.system + ('\\n\\n' if ns.n_system else '') -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- 'User: ' + message['content'] + '\\n\\n' -}}
{%- elif message['role'] == 'assistant' -%}{{- 'Assistant: ' + message['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""

CODER = """
{{- bos_token -}}
{%- set ns = namespace(system='', n_system=0) -%}
{%- for message in messages if message['role'] == 'system' -%}
{%- set ns.system = ns.system + message['content'] -%}{%- set ns.n_system = ns.n_system + 1 -%}
{%- endfor -%}
{{- ns.system if ns.n_system else «DEFAULT» -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '### Instruction:\\n' + message['content'] + '\\n### Response:\\n' -}}
{%- elif message['role'] == 'assistant' -%}{{- message['content'] + '\\n<|EOT|>\\n' -}}
{%- endif -%}
{%- endfor -%}
"""

# Parts of the templates below, which replace «NAME».
SYSTEM = """
{%- set ns = namespace(system='', n_system=0, is_last_user=false, is_output=false) -%}
{%- for message in messages if message['role'] == 'system' -%}
{%- set ns.system = ns.system + ('\\n\\n' if ns.n_system else '') + message['content'] -%}
{%- set ns.n_system = ns.n_system + 1 -%}
{%- endfor -%}
"""
TOOLS = """
{%- if tools -%}
{{- (ns.system or 'You are a helpful Assistant.') + '\\n\\n## Tools\\n\\n### Function\\n\\n' -}}
{{- 'You have the following functions available:' -}}
{%- for tool in tools -%}
{{- ('\\n\\n' if loop.first else '\\n') + '- `' + tool['function']['name'] + '`:\\n```json\\n' -}}
{{- tool['function'] | tojson(indent=4) -}}{{- '\\n```' -}}
{%- endfor -%}
{%- else -%}{{- ns.system -}}
{%- endif -%}
"""
ARGUMENTS = """
{%- macro arguments(call) -%}
{%- if call['function']['arguments'] is string -%}{{- call['function']['arguments'] -}}
{%- else -%}{{- (call['function']['arguments'] or {}) | tojson -}}
{%- endif -%}
{%- endmacro -%}
"""
WRITE = """
{%- macro write(call) -%}
{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call['function']['name'] + '\\n```json\\n' -}}
{{- arguments(call) -}}{{- '\\n```<｜tool▁call▁end｜>' -}}
{%- endmacro -%}
"""
AFTER_THOUGHT = """
{%- if '</think>' in content -%}{%- set content = content.split('</think>')[-1] -%}{%- endif -%}
"""

# V3-0324 and R1-0528. KEEP: the part that remains of an earlier answer; OPEN: after the last <｜Assistant｜>.
V3 = """
{{- bos_token -}}
«SYSTEM»«ARGUMENTS»«WRITE»«TOOLS»
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<｜User｜>' + message['content'] -}}{%- set ns.is_last_user = true -%}
{%- elif message['role'] == 'assistant' -%}
{{- '<｜Assistant｜>' if ns.is_last_user else '' -}}{%- set ns.is_last_user = false -%}
{%- set content = message['content'] or '' -%}«KEEP»{{- content -}}
{%- if message['tool_calls'] -%}
{{- '<｜tool▁calls▁begin｜>' -}}
{%- for call in message['tool_calls'] -%}{{- ('' if loop.first else '\\n') + write(call) -}}{%- endfor -%}
{{- '<｜tool▁calls▁end｜>' -}}
{%- endif -%}
{{- eos_token -}}
{%- elif message['role'] == 'tool' -%}
{{- '\\n' if loop.previtem['role'] == 'tool' else '<｜tool▁outputs▁begin｜>' -}}
{{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
{%- if loop.last or loop.nextitem['role'] != 'tool' -%}{{- '<｜tool▁outputs▁end｜>' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.is_last_user -%}{{- '<｜Assistant｜>' -}}«OPEN»{%- endif -%}
"""

V31 = """
{{- bos_token -}}
«SYSTEM»«ARGUMENTS»{{- ns.system -}}
{%- if tools -%}
{{- '\\n\\n## Tools\\nYou have access to the following tools:\\n\\n' -}}
{%- for tool in tools -%}
{{- '### ' + tool['function']['name'] + '\\nDescription: ' + (tool['function']['description'] or '') -}}
{{- '\\n\\nParameters: ' -}}{{- (tool['function']['parameters'] or {}) | tojson -}}{{- '\\n\\n' -}}
{%- endfor -%}
{{- 'IMPORTANT: ALWAYS adhere to this exact format for tool use:\\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' -}}
{{- 'tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>{additional_tool_calls}' -}}
{{- '<｜tool▁calls▁end｜>\\n\\nWhere:\\n- `tool_call_name` must be an exact match to one of the available tools\\n' -}}
{{- '- `tool_call_arguments` must be valid JSON that strictly follows the tool\\'s Parameters Schema\\n' -}}
{{- '- For multiple tool calls, chain them directly without separators or spaces' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<｜User｜>' + message['content'] -}}{%- set ns.is_last_user = true -%}
{%- elif message['role'] == 'assistant' -%}
{{- '<｜Assistant｜></think>' if ns.is_last_user else '' -}}
{%- set content = message['content'] or '' -%}
{%- if not message['tool_calls'] and ns.is_last_user -%}
{%- set content = content.split('</think>', 1)[-1] -%}
{%- endif -%}
{{- content -}}{%- set ns.is_last_user = false -%}
{%- if message['tool_calls'] -%}
{{- '<｜tool▁calls▁begin｜>' -}}
{%- for call in message['tool_calls'] -%}
{{- '<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>' + arguments(call) + '<｜tool▁call▁end｜>' -}}
{%- endfor -%}
{{- '<｜tool▁calls▁end｜>' -}}
{%- endif -%}
{{- eos_token -}}
{%- elif message['role'] == 'tool' -%}
{{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.is_last_user -%}
{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') -}}
{%- endif -%}
"""

# The first templates. PROMPT: reads system prompts; BEFORE: text before BOS; CALLS: writes a message with calls.
FIRST = """
«PROMPT»«ARGUMENTS»«WRITE»{{- «BEFORE» + bos_token -}}«TOOLS»
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- '<｜User｜>' + message['content'] -}}
{%- elif message['role'] == 'assistant' and message['tool_calls'] -%}«CALLS»{%- set ns.is_first = false -%}
{%- elif message['role'] == 'assistant' -%}
{%- set content = message['content'] or '' -%}
{%- if loop.previtem['role'] == 'tool' -%}{{- '<｜tool▁outputs▁end｜>' -}}
{%- else -%}{{- '<｜Assistant｜>' -}}«KEEP»
{%- endif -%}
{{- content + eos_token -}}
{%- elif message['role'] == 'tool' -%}
{{- '<｜tool▁outputs▁begin｜>' if ns.is_output_first else «BETWEEN» -}}{%- set ns.is_output_first = false -%}
{{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
{%- endif -%}
{%- endfor -%}
{%- if messages[-1]['role'] == 'tool' -%}{{- '<｜tool▁outputs▁end｜>' -}}
{%- elif messages[-1]['role'] == 'user' and add_generation_prompt -%}{{- '<｜Assistant｜>' -}}«OPEN»
{%- endif -%}
"""
LAST_PROMPT = """
{%- set ns = namespace(system='', n_system=0, is_first=true, is_output_first=true) -%}
{%- for message in messages if message['role'] == 'system' -%}
{%- set ns.system = message['content'] -%}{%- set ns.n_system = ns.n_system + 1 -%}
{%- endfor -%}
"""
ALL_PROMPTS = """
{%- set ns = namespace(system='', is_first_sp=true, is_first=true, is_output_first=true) -%}
{%- for message in messages if message['role'] == 'system' -%}
{%- set ns.system = ns.system + ('' if ns.is_first_sp else '\\n\\n') + message['content'] -%}
{%- set ns.is_first_sp = false -%}
{%- endfor -%}
"""
CALLS_ALONE = """
{%- for call in message['tool_calls'] -%}
{%- if loop.first and ns.is_first -%}{{- '<｜Assistant｜><｜tool▁calls▁begin｜>' + write(call) -}}
{%- else -%}{{- '\\n' + write(call) + '<｜tool▁calls▁end｜>' + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
CALLS_AFTER_CONTENT = """
{%- if ns.is_first -%}{{- '<｜Assistant｜>' + (message['content'] or '') + '<｜tool▁calls▁begin｜>' -}}{%- endif -%}
{%- for call in message['tool_calls'] -%}
{{- ('' if loop.first and ns.is_first else '\\n') + write(call) -}}
{%- endfor -%}
{{- '<｜tool▁calls▁end｜>' + eos_token -}}
"""
OPENS_BY_DEFAULT = "{{- '<think>\\n' if thinking is not defined or thinking else '' -}}"
OPENS = "{{- '<think>\\n' if thinking else '' -}}"


def _filled(text: str, **parts: str) -> str:
    """Returns a template with the given parts in place of their names, then the shared ones."""
    shared = {"SYSTEM": SYSTEM, "TOOLS": TOOLS}
    for name, part in (parts | shared | {"ARGUMENTS": ARGUMENTS, "WRITE": WRITE}).items():
        text = text.replace(f"«{name}»", part.strip())
    return "".join(line.strip("\n") for line in text.splitlines(keepends=True))


def _first(prompt: str, calls: str, before: str = "''", between: str = "'\\n'", keep: str = "", opens: str = "") -> str:
    """Returns one of the first templates with tools."""
    parts = {"PROMPT": prompt, "BEFORE": before, "CALLS": calls, "BETWEEN": between, "KEEP": keep, "OPEN": opens}
    return _filled(FIRST, **parts)


TEXTS = {
    "v1": _filled(PLAIN),
    "v2": _filled(PLAIN),
    "coder": _filled(CODER, DEFAULT=repr(CODER_SYSTEM)),
    "v2.5": _first(LAST_PROMPT, CALLS_ALONE, before="' ' * (8 * ns.n_system)"),
    "v3-1226": _first(ALL_PROMPTS, CALLS_ALONE),
    "v3": _filled(V3, KEEP="", OPEN=""),
    "r1-0120": _first(ALL_PROMPTS, CALLS_AFTER_CONTENT, between="''", keep=AFTER_THOUGHT, opens=OPENS_BY_DEFAULT),
    "r1-distill": _first(LAST_PROMPT, CALLS_ALONE, keep=AFTER_THOUGHT, opens=OPENS_BY_DEFAULT),
    "r1": _filled(V3, KEEP=AFTER_THOUGHT, OPEN=OPENS),
    "v31": _filled(V31),
}
