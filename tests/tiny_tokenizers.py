"""Tokenizers of a few words, under several kinds of chat template."""

from collections.abc import Callable

from paths import RECIPES
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (RECIPES / "templates/human_assistant.jinja").read_text()
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
THINKING = (  # no BOS; an empty thinking block before the last response only
    "{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)
TURNS = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "Tell me more, please"},
]
WORDS = ["How", "are", "you", "?", "Fine", ".", "Tell", "me", "more", ",", "please"]
WORDS += ["I", "will", "not", "tell", "model", "user", "assistant", "think"]


def word_level(template: str, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word; the special tokens of Gemma."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    vocabulary = {word: i for i, word in enumerate([*specials, "<think>", "</think>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    backend.add_special_tokens(specials)
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer


def byte_level(template: str, merging: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE; with `merging`, without a pre-tokenizer that would keep merges inside words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merging)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]
    )
    text = "\n\nHuman: How are you?\n\nAssistant: Fine.\n\nHuman: Tell me more.\n\nAssistant: I will not tell."
    backend.train_from_iterator([text] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "words, Gemma": lambda: word_level(GEMMA),
    "words, thinking": lambda: word_level(THINKING),
    "words, Human": lambda: word_level(TEMPLATE),
    "bytes, Human": lambda: byte_level(TEMPLATE, merging=False),
    "bytes, thinking": lambda: byte_level(THINKING, merging=False),
}
