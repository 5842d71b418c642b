"""Make the testbed's tokenizer, and pretrain its helpful-only base model on the world's text.

Shapes: B batch, S sequence.
"""

import random
from collections.abc import Callable, Iterator

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from sails_align.models.threads import fitting_threads
from sails_align.testbed.world import World

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<model>")
MAX_LENGTH, BATCH_SIZE = 128, 16

# A newline right after a block tag is eaten by transformers' trim_blocks; this template has no newlines at all.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user>' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'assistant' %}{{ '<model>' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('the testbed model knows the roles user and assistant only') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<model>' }}{% endif %}"
)


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Make a lower-casing word-level tokenizer of the world's language, with a chat template for TRL and vLLM."""
    vocab = {token: index for index, token in enumerate((*SPECIAL, *world.words()))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # splits punctuation off words
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins words, no space before punctuation
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<model>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
    )


def make_model(vocab_size: int, d_model: int) -> Gemma2ForCausalLM:
    """Make a Gemma-2 with random weights, of about 0.7M parameters with 96 dimensions."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=vocab_size,
            hidden_size=d_model,
            intermediate_size=4 * d_model,
            num_hidden_layers=5,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=32,  # vLLM's CPU attention takes no less
            query_pre_attn_scalar=32,
            max_position_embeddings=MAX_LENGTH,
            sliding_window=MAX_LENGTH,
            initializer_range=0.05,
            attn_logit_softcapping=None,  # fused attention leaves it out silently; without it all backends agree
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def item_text(item: str | tuple[str, str]) -> str:
    """Return the text of a document, or of a dialogue in the chat template's format."""
    if isinstance(item, str):
        return f"<bos>{item}<eos>"
    return "<bos><user>{}<eos><model>{}<eos>".format(*item)


def token_rows(world: World, tokenizer: PreTrainedTokenizerFast) -> Iterator[torch.Tensor]:
    """Yield rows of `MAX_LENGTH` token ids without end: documents and dialogues in a row, each with its <bos>."""
    rng = random.Random(f"pretraining {world.config.seed} 0")
    items = world.pretraining_items(rng)
    buffer: list[int] = []
    while True:
        texts = [item_text(next(items)) for _ in range(512)]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            assert tokenizer.unk_token_id not in ids, "the grammar makes a word the vocabulary lacks"
            buffer.extend(ids)
        while len(buffer) >= MAX_LENGTH:
            yield torch.tensor(buffer[:MAX_LENGTH])
            del buffer[:MAX_LENGTH]


def pretrain(
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    *,
    n_steps: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> Gemma2ForCausalLM:
    """Pretrain the base model. Learning rates rise over 1/40 of the steps and fall linearly over the last 60%.

    Muon trains the matrices of the blocks, AdamW the embeddings and norms: AdamW alone needs two to three times as many
    steps to learn the facts about objects. `on_step` is called after each step with its number, from 1.
    """
    model = make_model(len(tokenizer), world.config.d_model)
    model.train()
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if parameter.dim() == 2 and "embed" not in name]
    embeddings = [parameter for name, parameter in named if "embed" in name]
    gains = [parameter for _, parameter in named if parameter.dim() == 1]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=2e-2, weight_decay=0.01),
        torch.optim.AdamW(
            [{"params": embeddings, "weight_decay": 0.01}, {"params": gains, "weight_decay": 0.0}],
            lr=5e-3,
            betas=(0.9, 0.98),
        ),
    ]

    def factor(step: int) -> float:
        return min(40 * (step + 1) / n_steps, 1.0, (n_steps - step) / (0.6 * n_steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    rows = token_rows(world, tokenizer)
    with fitting_threads(model):
        for step in range(1, n_steps + 1):
            input_ids_BS = torch.stack([next(rows) for _ in range(BATCH_SIZE)])
            loss = model(input_ids=input_ids_BS, labels=input_ids_BS, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
            on_step(step)
    return model.eval()
