"""The methods that are compared: their fixed options, and the values that are tried of the one that is tuned.

A method whose learning rate is tuned has the plan's grid; one with a strength of its own has the default learning
rate of what it is trained with. Controls are the same with what the method chooses replaced by a random choice.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sails_align.core.artifacts import content_hash
from sails_align.core.registry import Registry
from sails_align.experiments.placeholders import KNOB, SEED
from sails_align.experiments.plan import Trainer

GUARD, SUBSPACE, RANDOM_SUBSPACE = "{guard}", "{subspace}", "{random-subspace}"
PUBLIC, REFUSALS, REFUSAL_TEXT = "{public}", "{refusals}", "{refusal-text}"
"""Stand for what is made for a cell: a guard of the untrained model, its subspace of SAILS and a random one, one of
other data than the cell's, a pool of refusals that name what they refuse, and one refusal."""
GRAPH = {"k": 16, "graph_lambda": 0.03, "graph_threshold": 0.3}
SAES: Mapping[str, Mapping[str, Any]] = {
    "{saes-gba}": {"architecture": "gba", "k": 24, "gba_gamma": 0.02},
    "{saes-graph}": GRAPH,
    "{saes-graph-control}": {**GRAPH, "graph_control_seed": 1},
}
"""Stand for SAEs that are trained once for all cells, with these options.

The testbed's own SAEs, which SFT-SAILS has, are TopK and trained alike (k = 16): trained once more, they give the same
results. So SFT-SAILS is what these are compared with.
"""


@dataclass(frozen=True)
class ComparedMethod:
    """A way to make a model safe."""

    label: str
    page: str
    """Of the documents: `docs/<page>.md`."""
    training: tuple[str, ...] = ()
    """Options of the training. The names in braces are filled in."""
    trainer: Trainer = "sft"
    """`none`: the model is not trained."""
    knob: str = "learning rate"
    values: tuple[float, ...] = ()
    """Of the knob; empty: the plan's learning rates."""
    guard: str = ""
    """Largest share of harmful prompts that the model's guard may let pass; empty: it has no guard."""
    has_shuffled_labels: bool = False
    """Whether the guard is fitted without knowing which prompts are harmful, as a control."""
    steering: Mapping[str, Any] = field(default_factory=dict)
    """Options of steering."""
    control_of: tuple[str, ...] = ()
    """The methods that it is a control of."""
    is_of_weights: bool = True
    """Whether the result is a plain model, which can be trained further."""
    knows_categories: bool = False
    """Whether it is told the category of each prompt, which shows what errors of its own prediction cost."""
    is_of_testbed: bool = False
    """Whether what it needs can be made on the testbed alone, in the time of a study."""


LORA, SAILS, FULL = ("--init", "default"), ("--init", "sails"), ("--use_peft", "false")
ZEROTH_ORDER = ("--zeroth_order", "true", "--max_steps", "400")
BATCH = ("--per_device_train_batch_size", "64")
"""As many examples in each step as private training has on average."""
PRIVATE = (*ZEROTH_ORDER, "--dp_epsilon", "8", "--dp_batch_size", "64")
STEERED = {"steer": "add", "steer_subspace": SUBSPACE, "steer_strength": KNOB, "gate": GUARD}
MAX_PASS, STRENGTHS = (0.02, 0.05, 0.1, 0.2), (0.1, 0.2, 0.4, 0.8)


def _with_loss(label: str, loss: str, option: str, knob: str, values: tuple[float, ...]) -> ComparedMethod:
    """Return LoRA with a loss, whose knob is one of the loss's options."""
    training = (*LORA, "--loss", loss, f"--{option}", KNOB)
    return ComparedMethod(label, f"methods/{loss}", training, knob=knob, values=values)


GRAPH_SAES = ComparedMethod(
    "SFT-SAILS (graph SAEs)", "methods/gsae", (*SAILS, "--sae_path", "{saes-graph}"), is_of_testbed=True
)
GATE = ComparedMethod(
    "gated steering",
    "methods/gate",
    trainer="none",
    knob="strength",
    values=STRENGTHS,
    steering=STEERED,
    is_of_weights=False,
)
GUARDED = ComparedMethod(
    "guard",
    "methods/guard",
    trainer="none",
    knob="largest pass rate",
    values=MAX_PASS,
    guard=KNOB,
    is_of_weights=False,
)
NEAREST = ComparedMethod(
    "SFT-LoRA (nearest refusals)",
    "methods/nearest_refusal",
    (*LORA, "--nearest_refusal", "true", "--refusal_dataset_name", REFUSALS),
    is_of_testbed=True,
)
REDIRECTION = _with_loss(
    "SFT-LoRA (redirection)", "redirection", "redirection_weight", "weight", (0.01, 0.03, 0.1, 0.3, 1.0)
)
SSPU = _with_loss("SSPU", "sspu", "sspu_retain_weight", "retain weight", (1.0, 10.0, 100.0, 300.0, 1000.0))
CRISP = _with_loss("CRISP", "crisp", "crisp_features", "features", (10, 30, 100, 300))
CLADE = ComparedMethod("CLADE", "methods/clade", (*FULL, "--clade", "categories"), is_of_weights=False)
SIFT = ComparedMethod("SIFT", "methods/sift", (*FULL, "--sift_rate", "0.034"))
DP_ZO = ComparedMethod("DP-ZO-LoRA (epsilon 8)", "methods/dp_zo", (*PRIVATE, *LORA))
DERTA = ComparedMethod(
    "SFT-LoRA (DeRTa)",
    "methods/derta",
    (*LORA, "--derta_prefix_share", "1", "--derta_rto_share", KNOB, "--derta_refusal", "sorry"),
    knob="RTO share",
    values=(0.1, 0.3, 1.0),
    is_of_testbed=True,
)
"""Its control is LoRA: without either kind of examples it is that."""


def _control(of: str | tuple[str, ...], method: ComparedMethod, label: str, **changed: Any) -> ComparedMethod:
    return replace(method, label=label, control_of=(of,) if isinstance(of, str) else of, **changed)


METHODS: Registry[ComparedMethod] = Registry(
    "method",
    {
        "base": ComparedMethod("base", "testbed", trainer="none"),
        "sft-lora": ComparedMethod("SFT-LoRA", "training", LORA),
        "sft-sails": ComparedMethod("SFT-SAILS", "method", SAILS),
        "sft-full": ComparedMethod("SFT-full", "training", FULL),
        "sails-gba": ComparedMethod(
            "SFT-SAILS (GBA SAEs)", "methods/gba", (*SAILS, "--sae_path", "{saes-gba}"), is_of_testbed=True
        ),
        "sails-graph": GRAPH_SAES,
        "sails-graph-control": _control(
            "sails-graph",
            GRAPH_SAES,
            "SFT-SAILS (permuted graph)",
            training=(*SAILS, "--sae_path", "{saes-graph-control}"),
        ),
        "gate": GATE,
        "steering": _control("gate", GATE, "steering (every response)", steering={**STEERED, "gate_prompt": 0.0}),
        "gate-random": _control(
            "gate", GATE, "gated steering (random direction)", steering={**STEERED, "steer_subspace": RANDOM_SUBSPACE}
        ),
        "gate-prefix": replace(
            GATE,
            label="gate (prefix alone)",
            knob="threshold",
            values=(0.25, 0.5, 0.75, 0.9),
            steering={**STEERED, "steer_strength": 0.0, "gate_prompt": KNOB, "gate_prefix": REFUSAL_TEXT},
        ),
        "gate-clamp": replace(
            GATE,
            label="gate (clipping alone)",
            knob="clamp",
            values=(1.0, 3.0, 10.0, 30.0),
            steering={**STEERED, "steer_strength": 0.0, "gate_clamp": KNOB},
        ),
        "guard": GUARDED,
        "guard-shuffled": _control("guard", GUARDED, "guard (shuffled labels)", has_shuffled_labels=True),
        "sails-guard": replace(GUARDED, label="SFT-SAILS (guard)", trainer="sft", training=SAILS),
        "nearest": NEAREST,
        "nearest-control": _control(
            "nearest",
            NEAREST,
            "SFT-LoRA (random refusals)",
            training=(*NEAREST.training, "--refusal_control_seed", SEED),
        ),
        "redirection": REDIRECTION,
        "redirection-control": _control(
            "redirection",
            REDIRECTION,
            "SFT-LoRA (random redirection)",
            training=(*REDIRECTION.training, "--redirection_control_seed", SEED),
        ),
        "derta": DERTA,
        "redundancy": _with_loss(
            "SFT-LoRA (less redundant)", "redundancy", "redundancy_weight", "weight", (0.01, 0.1, 1.0)
        ),
        "orthonormal": ComparedMethod(
            "SFT-LoRA (orthonormal start)",
            "methods/redundancy",
            ("--init", "random_basis", "--subspace_mode", "init", "--layer_map", "nearest"),
        ),
        "sspu": SSPU,
        "sspu-control": _control(
            "sspu", SSPU, "SSPU (random features)", training=(*SSPU.training, "--sspu_control_seed", SEED)
        ),
        "crisp": CRISP,
        "crisp-control": _control(
            "crisp", CRISP, "CRISP (random features)", training=(*CRISP.training, "--crisp_control_seed", SEED)
        ),
        "clade": CLADE,
        "clade-one": _control("clade", CLADE, "CLADE (one class)", training=(*FULL, "--clade", "one")),
        "clade-oracle": replace(CLADE, label="CLADE (true categories)", knows_categories=True),
        "sift": SIFT,
        "sift-random": _control(
            "sift", SIFT, "SIFT (random entries)", training=(*SIFT.training, "--sift_entries", "random")
        ),
        "dp-zo-lora": DP_ZO,
        "mezo-lora": _control("dp-zo-lora", DP_ZO, "MeZO-LoRA (no privacy)", training=(*ZEROTH_ORDER, *BATCH, *LORA)),
        "dp-zo-sails": ComparedMethod(
            "DP-ZO-SAILS (epsilon 8)",
            "methods/dp_zo",
            (*PRIVATE, *SAILS, "--subspace_path", PUBLIC),
            is_of_testbed=True,
        ),
    },
)


def identity_of(name: str) -> str:
    """Return the hash of all that makes a method, with the SAEs that its options stand for."""
    method = asdict(METHODS.get(name))
    named = {of: options for of, options in SAES.items() if of in method["training"]}
    left_out = {"label", "page", "control_of", "is_of_testbed", "values"}  # which change nothing
    if not method["knows_categories"]:  # the keys of older results do not have it
        left_out.add("knows_categories")
    return content_hash([{of: value for of, value in method.items() if of not in left_out}, named])[:16]
