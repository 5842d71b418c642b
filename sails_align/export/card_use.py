"""What a model is for and how to load it, as sections of the model card."""

from pathlib import Path

from transformers import PreTrainedConfig

from sails_align.core.errors import InputError
from sails_align.evaluation.backends.serving import serve_command, serving_report
from sails_align.export.card_facts import Facts, code, number
from sails_align.models.adapters import load_base_config, read_adapter
from sails_align.models.attention import exact_attention

MEASURES = {
    "safety_rate": "safety rate",
    "over_refusal_rate": "over-refusal",
    "correct_answer_rate": "correctness of answers",
    "attack_success_rate": "attacks (adversarial suffixes, wrappers)",
    "capability": "general capability",
}

ADVICE = """For research on safety alignment. Refusal is learned from examples: it is a tendency, not a guarantee.
  Do not rely on it alone where harm is possible. Test the model on your own requests, and keep other safeguards."""
RATES = {
    "safety_rate_out_of_distribution": "Harmful requests of held-out categories were answered safely in",
    "over_refusal_rate": "Harmless requests were refused in",
}
CITATIONS = """## Citation

```bibtex
@misc{wang2025sails,
  title         = {Interpretable Safety Alignment via {SAE}-Constructed Low-Rank Subspace Adaptation},
  author        = {Wang, Dianyun and Ma, Qingsen and Shang, Yuhu and Lu, Zhifeng and Xu, Zhenbo and Ning, Lechen and
                   Wu, Huijia and He, Zhaofeng},
  year          = {2025},
  eprint        = {2512.23260},
  archivePrefix = {arXiv}
}
@software{vonwerra2020trl,
  title  = {{TRL: Transformers Reinforcement Learning}},
  author = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and
            Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallou{\\'e}dec, Quentin},
  url    = {https://github.com/huggingface/trl},
  year   = {2020}
}
@misc{peft,
  title  = {{PEFT}: State-of-the-art Parameter-Efficient Fine-Tuning methods},
  author = {Mangrulkar, Sourab and Gugger, Sylvain and Debut, Lysandre and Belkada, Younes and Paul, Sayak and
            Bossan, Benjamin},
  url    = {https://github.com/huggingface/peft},
  year   = {2022}
}
```"""


def uses(facts: Facts) -> str:
    """Intended use, and limits: those that were measured, and what was not measured."""
    trained = facts.metrics.get("trained") or {}
    lines = [ADVICE]
    for name, told in RATES.items():
        if isinstance(trained.get(name), dict) and trained[name].get("value") is not None:
            share, n = number(trained[name]["value"], ".1%"), number(trained[name].get("n"), "d")
            lines.append(f"{told} {share} of cases (n = {n}).")
    missing = [label for name, label in MEASURES.items() if name not in trained]
    lines += [f"Not measured in this run: {', '.join(missing)}."] if missing else []
    if facts.on_testbed:
        lines.append("The testbed is a small synthetic world. Its numbers say nothing about a real model.")
    lines.append("The limits of the base model also apply.")
    return "## Intended use and limits\n\n" + "\n".join(f"- {line}" for line in lines)


def loading(facts: Facts, run: Path) -> str:
    """Code that loads the model with PEFT, transformers and vLLM."""
    config = _base_config(facts, run)
    eager = config is not None and exact_attention(config) == "eager"
    sections = [
        "## How to load it",
        "PATH is this folder, or its id on the hub. Format dialogues with the tokenizer's chat template.",
    ]
    if eager:
        sections.append("Load it with eager attention, as below. The default skips the soft-capping of Gemma 2.")
    if facts.kind == "adapter":
        sections += ["With PEFT:", _python("peft", "AutoPeftModelForCausalLM", eager)]
    sections += ["With transformers:", _python("transformers", "AutoModelForCausalLM", eager)]
    sections += ["With vLLM:", f"```bash\n{_vllm(facts, run, config)}\n```"]
    return "\n\n".join(sections)


def _base_config(facts: Facts, run: Path) -> PreTrainedConfig | None:
    if not facts.adapter:
        return None
    try:
        return load_base_config(read_adapter(run))[1]
    except InputError:  # the base model may be elsewhere by now; the card can do without it
        return None


def _python(library: str, name: str, eager: bool) -> str:
    attention = ', attn_implementation="eager"' if eager else ""
    imports = "from transformers import AutoTokenizer" if library != "transformers" else ""
    imports = f"from {library} import {name}{'' if imports else ', AutoTokenizer'}\n{imports}".strip()
    return (
        f"```python\n{imports}\n\nmodel = {name}.from_pretrained(PATH{attention})\n"
        "tokenizer = AutoTokenizer.from_pretrained(PATH)\n```"
    )


def _vllm(facts: Facts, run: Path, config: PreTrainedConfig | None) -> str:
    if facts.kind != "adapter":
        return "vllm serve PATH"
    if config is None:
        return "# run: sails check-adapter PATH"
    blocking = [problem.what for problem in serving_report(run, config) if problem.blocking]
    if blocking:
        return f"# not as it is: {code(blocking[0])[1:-1]};\n# merge it first: sails merge PATH --output MERGED"
    return serve_command(read_adapter(run), facts.base_on_hub or "BASE_MODEL", "PATH")


def license(facts: Facts) -> str:
    """The base model's licence, or that it is not known."""
    found = facts.license()
    if found is None:
        return (
            "## Licence\n\n"
            "Unknown. The licences of the base model and of the data apply. Fill in `license` above before you "
            "publish this."
        )
    return f"## Licence\n\n{code(found)}, as for the base model. The licences of the data also apply."


def versions(facts: Facts) -> str:
    """Of the libraries it was made with."""
    found = dict(facts.record.get("versions", {}))
    commit = (facts.record.get("git") or {}).get("commit")
    found |= {"commit of sails-align": commit} if commit else {}
    named = [f"- {code(f'{name} {version}')}" for name, version in found.items() if version]
    return "## Versions\n\n" + "\n".join(named) if named else ""
