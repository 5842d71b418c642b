"""SAE training: planted data with a known answer, tiny models built here, and a small pretrained one."""

import gzip
import itertools
import json
import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import normalize
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sails_align.core.errors import InputError
from sails_align.data.tokens import batches_by_length, padded
from sails_align.models.hooks import hidden_states_at
from sails_align.saes.card import QUALITY, card_of
from sails_align.saes.layer_trainer import LayerTrainer
from sails_align.saes.load import residual_sae
from sails_align.saes.options import SAETrainingOptions
from sails_align.saes.quality import evaluate_saes, n_measured
from sails_align.saes.sets import SAESet
from sails_align.saes.source import SAESource
from sails_align.saes.token_stream import buffers, hidden_states_of, read_corpus, split_windows
from sails_align.saes.train import NOT_IN_IDENTITY, _Training, train_saes

WORDS = [f"w{index}" for index in range(60)]
METADATA = {"model_name": "tiny", "hook_name": "blocks.0.hook_resid_post"}
SMALL: dict[str, Any] = {
    "d_sae": 64,
    "k": 8,
    "n_tokens": 4000,
    "batch_size": 100,
    "context_size": 16,
    "model_name": "tiny",
    "eval_tokens": 500,
    "buffer_tokens": 1000,
    "progress": False,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_texts(rows: int = 300) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (rows,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(60, (length,), generator=generator)) for length in lengths]


def make_gemma2() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    ).eval()


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return read_corpus(make_texts(), tokenizer, n_tokens=4000, context_size=16)


# One SAE on planted data


def planted(n_tokens: int, d_model: int = 32, d_sae: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of three of many unit directions, far from the origin and badly scaled; and those directions."""
    generator = torch.Generator().manual_seed(0)
    directions_FD = normalize(torch.randn(d_sae, d_model, generator=generator), dim=1)
    active_TF = torch.rand(n_tokens, d_sae, generator=generator).argsort(dim=1) < 3
    strength_TF = 0.5 + torch.rand(n_tokens, d_sae, generator=generator)
    offset_D = torch.randn(d_model, generator=generator)
    return 30 * (active_TF * strength_TF @ directions_FD + offset_D), directions_FD


def options_for(n_tokens: int, **changes) -> SAETrainingOptions:
    options = SAETrainingOptions(d_sae=64, k=4, architecture="topk", lr=3e-3, n_tokens=n_tokens, batch_size=256, seed=0)
    return replace(options, **changes)


def explained_variance(hidden_TD: torch.Tensor, rebuilt_TD: torch.Tensor) -> float:
    residual = (hidden_TD - rebuilt_TD).square().sum()
    return 1 - (residual / (hidden_TD - hidden_TD.mean(0)).square().sum()).item()


def trained_sae(hidden_TD: torch.Tensor, options: SAETrainingOptions, folder: Path):
    from sae_lens import SAE

    trainer = LayerTrainer(hidden_TD.shape[1], options, "cpu", METADATA)
    while not trainer.done:
        trainer.train(hidden_TD)
    trainer.save_sae(folder)
    return residual_sae(str(folder), SAE.load_from_disk(folder))


def test_topk_finds_planted_directions(tmp_path):
    hidden_TD, directions_FD = planted(60_000)
    held_out_TD, hidden_TD = hidden_TD[:5000], hidden_TD[5000:]
    sae = trained_sae(hidden_TD, options_for(150_000), tmp_path / "trained")
    acts_TF = sae.encode(held_out_TD)
    assert explained_variance(held_out_TD, sae.decode(acts_TF)) > 0.9
    assert ((acts_TF > 0).sum(1) <= 4).all()
    torch.testing.assert_close(sae.W_dec_FD.norm(dim=1), torch.ones(64))
    torch.testing.assert_close(acts_TF @ sae.W_dec_FD + sae.sae.b_dec, sae.decode(acts_TF))
    found_F = (directions_FD @ sae.W_dec_FD.T).max(dim=1).values
    assert (found_F > 0.9).float().mean() > 0.9
    # Controls: a hardly trained SAE neither rebuilds nor finds them.
    control = trained_sae(hidden_TD, options_for(512), tmp_path / "control")
    assert explained_variance(held_out_TD, control.decode(control.encode(held_out_TD))) < 0.6
    assert ((directions_FD @ control.W_dec_FD.T).max(dim=1).values > 0.9).float().mean() < 0.2


def test_jumprelu_reaches_its_target_l0(tmp_path):
    hidden_TD, _ = planted(60_000)
    held_out_TD, hidden_TD = hidden_TD[:5000], hidden_TD[5000:]
    sae = trained_sae(hidden_TD, options_for(150_000, architecture="jumprelu"), tmp_path)
    acts_TF = sae.encode(held_out_TD)
    assert sae.info.architecture == "jumprelu"
    assert 3 < (acts_TF > 0).float().sum(1).mean() < 5
    assert explained_variance(held_out_TD, sae.decode(acts_TF)) > 0.9
    torch.testing.assert_close(sae.W_dec_FD.norm(dim=1), torch.ones(64))


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_folding_changes_nothing(tmp_path, architecture):
    """The saved SAE on raw hidden states = the trained one on scaled ones, in other units."""
    hidden_TD, _ = planted(3000)
    trainer = LayerTrainer(32, options_for(2560, architecture=architecture), "cpu", METADATA)
    while not trainer.done:
        trainer.train(hidden_TD)
    scaling = trainer.trainer.activation_scaler.scaling_factor
    assert scaling is not None
    assert scaling == pytest.approx(32**0.5 / hidden_TD.norm(dim=1).mean().item())
    expected_TD = trainer.trainer.sae(hidden_TD * scaling).detach() / scaling
    trainer.save_sae(tmp_path)
    from sae_lens import SAE

    sae = residual_sae(str(tmp_path), SAE.load_from_disk(tmp_path))
    torch.testing.assert_close(sae.decode(sae.encode(hidden_TD)), expected_TD, atol=1e-3, rtol=1e-4)


def test_state_goes_through_json_and_back():
    hidden_TD, _ = planted(2000)
    options = options_for(4000, lr=1e-2, batch_size=100)
    trainers = [LayerTrainer(32, options, "cpu", METADATA) for _ in range(2)]
    trainers[0].train(hidden_TD)
    tensors, counters = trainers[0].state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    trainers[1].load_state(tensors, json.loads(json.dumps(counters)))
    for trainer in trainers:
        trainer.train(hidden_TD)
    assert trainers[1].done
    for name, tensor in trainers[0].trainer.sae.state_dict().items():
        assert torch.equal(tensor, trainers[1].trainer.sae.state_dict()[name])


# The stream


@pytest.mark.parametrize("make_model", [make_gemma2, make_llama])
def test_hidden_states_are_those_of_content_tokens(tokenizer, corpus, make_model):
    model = make_model()
    windows = list(range(40))
    sequences = corpus.sequences(windows)
    hidden_TD = hidden_states_of(model, [1], sequences)[1]
    expected = []
    for sequence in (sequence for batch in batches_by_length(sequences, 8192) for sequence in batch):
        input_ids_BS, attention_mask_BS, content_BS = padded([sequence])
        assert input_ids_BS[0, 0] == tokenizer.bos_token_id
        assert not content_BS[0, 0]
        expected.append(hidden_states_at(model, [1], input_ids_BS, attention_mask_BS)[1][content_BS])
    torch.testing.assert_close(hidden_TD, torch.cat(expected), atol=1e-5, rtol=1e-4)
    assert len(hidden_TD) == corpus.content_counts()[:40].sum()


def test_special_tokens_are_not_content(tokenizer):
    corpus = read_corpus(["w1 <eos> w2 nonsense", "w3"], tokenizer, n_tokens=100, context_size=8)
    assert corpus.ids.tolist() == [1, 5, 2, 6, 3, 1, 7]
    assert corpus.content.tolist() == [False, True, False, True, False, False, True]
    assert corpus.content_counts().tolist() == [2, 1]


def test_token_sequences_are_taken_as_they_are(tokenizer):
    corpus = read_corpus([[1, 5, 6], [7, 8, 9, 10, 11]], tokenizer, n_tokens=100, context_size=4)
    assert corpus.ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist() == [3, 4, 1]
    assert not corpus.prepend_bos
    assert read_corpus([[1, 5, 6], [1, 7]], tokenizer, n_tokens=100, context_size=4).prepend_bos


def test_endless_texts_are_read_as_far_as_needed(tokenizer):
    corpus = read_corpus(itertools.cycle(["w1 w2 w3"]), tokenizer, n_tokens=1000, context_size=8)
    assert 1000 <= corpus.content.sum() < 2000


def test_held_out_windows_are_not_trained_on(tokenizer, caplog):
    texts = [f"w{n % 5} w{n % 7} w{n % 11}" for n in range(385)] + ["w1 w2 w3"] * 15
    corpus = read_corpus(texts, tokenizer, n_tokens=10_000, context_size=8)
    with caplog.at_level("INFO"):
        train_W, held_out = split_windows(corpus, eval_tokens=100, least=10, seed=0)
    n_drawn = len(corpus) - len(train_W)
    known = {corpus.tokens_of(window) for window in train_W.tolist()}
    assert 0 < len(held_out) < n_drawn
    assert not known & {corpus.tokens_of(window) for window in held_out}
    n = n_drawn - len(held_out)
    assert f"{n} of {n_drawn} held-out texts are trained on, too: they are not measured on" in caplog.text
    same = read_corpus(["w1 w2 w3"] * 50, tokenizer, n_tokens=1000, context_size=8)
    assert len(split_windows(same, eval_tokens=10, least=10, seed=0)[1]) == 4
    assert "4 of 4 held-out texts are trained on, too: no other text is held out" in caplog.text


def test_buffers_cover_each_epoch_and_can_be_resumed(corpus):
    train_W, held_out = split_windows(corpus, eval_tokens=300, least=100, seed=0)
    used = {corpus.tokens_of(window) for window in [*held_out, *train_W.tolist()]}
    assert used == {corpus.tokens_of(window) for window in range(len(corpus))}
    assert not set(held_out) & set(train_W.tolist())
    stream = list(itertools.islice(buffers(corpus, train_W, 500, seed=3), 30))
    again = list(itertools.islice(buffers(corpus, train_W, 500, seed=3), 20, 30))
    assert stream[20:] == again
    assert stream != list(itertools.islice(buffers(corpus, train_W, 500, seed=4), 30))
    served = list(itertools.chain(*stream))
    assert sorted(served[: len(train_W)]) == sorted(train_W.tolist())
    assert all(corpus.content_counts()[buffer].sum() >= 500 for buffer in stream)


# The report


def linear_sae(decoder_DD: torch.Tensor):
    """An SAE whose reconstruction of x is decoder @ x: positive and negative parts of each coordinate."""
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    d_model = len(decoder_DD)
    sae = StandardSAE(StandardSAEConfig(d_in=d_model, d_sae=2 * d_model, metadata=SAEMetadata(**METADATA)))
    eye = torch.eye(d_model)
    sae.W_enc.data = torch.cat([eye, -eye], dim=1)
    sae.W_dec.data = torch.cat([decoder_DD.T, -decoder_DD.T])
    return residual_sae("made here", sae)


def test_report_of_a_perfect_and_of_a_useless_sae(corpus):
    model = make_llama()
    model.lm_head.weight.data = model.model.embed_tokens.weight.data * 20  # so that ablation hurts or helps visibly
    perfect = evaluate_saes(model, {0: linear_sae(torch.eye(32))}, corpus.sequences(range(50)))[0]
    assert perfect.explained_variance == pytest.approx(1.0)
    assert perfect.loss_spliced == pytest.approx(perfect.loss_clean)
    assert perfect.l0 == pytest.approx(32)
    assert perfect.dead_fraction == 0
    assert perfect.eval_tokens == corpus.content_counts()[:50].sum()
    useless = evaluate_saes(model, {0: linear_sae(torch.zeros(32, 32))}, corpus.sequences(range(50)))[0]
    assert useless.explained_variance < 0.05
    assert useless.loss_spliced == pytest.approx(useless.loss_zero_ablation)
    assert abs(useless.loss_clean - useless.loss_zero_ablation) > 0.1
    for quality in (perfect, useless):
        hurts = quality.loss_zero_ablation > quality.loss_clean
        assert quality.loss_recovered == (pytest.approx(float(quality is perfect)) if hurts else None)


def test_splicing_leaves_the_model_as_it_was(corpus):
    model = make_llama()
    evaluate_saes(model, {0: linear_sae(torch.eye(32))}, corpus.sequences([0, 1]))
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())


def test_layers_measured_together_are_as_each_alone(corpus):
    model, sequences = make_llama(), corpus.sequences(range(50))
    saes = {layer: linear_sae(0.8 * torch.eye(32)) for layer in (0, 1)}
    counted: list[int] = []
    together = evaluate_saes(model, saes, sequences, advance=counted.append)
    assert sum(counted) == n_measured(sequences)
    for layer, sae in saes.items():
        assert together[layer] == evaluate_saes(model, {layer: sae}, sequences)[layer]


def test_massive_activations_are_told_apart(corpus):
    """One token with a norm a thousand times that of others holds nearly all the variance."""
    model, sequences = make_llama(), corpus.sequences(range(200))
    token = sequences[0].input_ids[1]  # after BOS
    model.model.embed_tokens.weight.data[token] *= 1000
    massive = sum(sequence.input_ids.count(token) for sequence in sequences)
    of_first = torch.zeros(32, 32)
    quality = evaluate_saes(model, {0: linear_sae(of_first)}, sequences, name_of=lambda id: f"token {id}")[0]
    assert quality.n_massive == massive
    assert quality.massive_tokens == {f"token {token}": massive}
    with torch.no_grad():
        direction_D = model.model.embed_tokens.weight[token] / model.model.embed_tokens.weight[token].norm()
    knows_it = evaluate_saes(model, {0: linear_sae(torch.outer(direction_D, direction_D))}, sequences)[0]
    assert knows_it.explained_variance > 0.99
    assert knows_it.explained_variance_typical is not None
    assert knows_it.explained_variance_typical < 0.5


# The whole


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "sae_weights.safetensors")


def same_weights(folder: Path, other: Path) -> bool:
    ours, theirs = weights(folder), weights(other)
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_train_and_load(tmp_path, tokenizer):
    model = make_gemma2().train()
    options: dict[str, Any] = SMALL | {"n_tokens": 20_000, "k": 16}
    reports = train_saes(model, tokenizer, make_texts(), [0, 2], output_dir=tmp_path, **options)
    assert model.training
    assert list(reports) == [0, 2]
    for layer, report in reports.items():
        assert json.loads((tmp_path / f"layer_{layer}" / "report.json").read_text()) == vars(report)
        assert report.layer == layer
        assert report.explained_variance > 0.8
        assert report.l0 <= 16
        assert 0 <= report.dead_fraction < 0.5
        assert report.tokens_trained == 20_000
        assert report.seconds > 0
    saes = SAESet.load(SAESource(path=str(tmp_path)), model_config=model.config, model_name="tiny")
    assert list(saes) == [0, 2]
    assert saes[2].info.hook_name == "blocks.2.hook_resid_post"
    assert saes[2].sae.cfg.metadata.prepend_bos
    config = json.loads((tmp_path / "layer_2" / "cfg.json").read_text())
    assert config["metadata"]["sae_lens_version"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layer_0", "layer_2"]


class Killed(BaseException):
    """As abrupt as a signal."""


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, tokenizer, monkeypatch):
    model, texts = make_llama(), make_texts()
    train_saes(model, tokenizer, texts, [0, 1], output_dir=tmp_path / "whole", **SMALL)
    original, calls = LayerTrainer.train, []

    def killed_at_the_sixth(self, hidden_TD):
        calls.append(self)
        if len(calls) == 6:  # the second layer's third buffer, the first layer's having been saved
            raise Killed
        original(self, hidden_TD)

    options = SMALL | {"output_dir": tmp_path / "parts", "checkpoint_steps": 5}
    monkeypatch.setattr(LayerTrainer, "train", killed_at_the_sixth)
    with pytest.raises(Killed):
        train_saes(model, tokenizer, texts, [0, 1], **options)
    assert sorted(folder.name for folder in (tmp_path / "parts").iterdir()) == [
        ".layer_0.checkpoint",
        ".layer_1.checkpoint",
    ]
    train_saes(model, tokenizer, texts, [0, 1], **options)
    uninterrupted = 2 * (SMALL["n_tokens"] // 1000 + 1)
    assert len(calls) < 6 + uninterrupted - 3  # it did not start anew
    for layer in ("layer_0", "layer_1"):
        assert same_weights(tmp_path / "whole" / layer, tmp_path / "parts" / layer)


def test_a_damaged_checkpoint_is_named(tmp_path, tokenizer, monkeypatch):
    options = SMALL | {"output_dir": tmp_path, "checkpoint_steps": 1}
    monkeypatch.setattr("sails_align.saes.train.evaluate_saes", lambda *_, **__: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        train_saes(make_llama(), tokenizer, make_texts(), [0], **options)
    file = tmp_path / ".layer_0.checkpoint" / "sae_checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00\x00")
    with pytest.raises(InputError, match="corrupted"):
        train_saes(make_llama(), tokenizer, make_texts(), [0], **options)


def test_what_decides_an_sae_is_hashed_as_it_always_was(tmp_path, tokenizer):
    """With anything else in the hash, the SAEs in users' folders would be trained again."""
    model, texts = make_llama(), make_texts()
    given = {name: value for name, value in SMALL.items() if name not in ("model_name", "progress")}
    options = SAETrainingOptions(**given).for_width(model.config.hidden_size)
    corpus = read_corpus(texts, tokenizer, n_tokens=10**6, context_size=options.context_size)
    names = {"model_name": "tiny", "dataset_path": None}
    training = _Training.of(model, corpus, options, names, tmp_path)
    of_options = {"architecture", "batch_size", "buffer_tokens", "d_sae", "k", "lr", "n_tokens", "seed"}
    assert training.inputs.keys() == of_options | {"metadata", "model", "tokens"}
    later = set(options.unused)
    assert of_options | NOT_IN_IDENTITY.keys() | later == {option.name for option in fields(SAETrainingOptions)}
    half = _Training.of(model, corpus, replace(options, save_dtype="float16"), names, tmp_path)
    assert half.inputs == {**training.inputs, "save_dtype": "float16"}
    fewer = _Training.of(model, corpus, replace(options, eval_tokens=100), names, tmp_path)
    assert fewer.input_hash(0) != training.input_hash(0)  # by its tokens


def test_weights_saved_at_16_bits_are_those_of_32_rounded(tmp_path, tokenizer):
    model, texts = make_llama(), make_texts()
    full = train_saes(model, tokenizer, texts, [1], output_dir=tmp_path / "full", **SMALL)[1]
    half = train_saes(model, tokenizer, texts, [1], output_dir=tmp_path / "half", save_dtype="float16", **SMALL)[1]
    of_half, of_full = (load_file(tmp_path / name / "layer_1" / "sae_weights.safetensors") for name in ("half", "full"))
    for name, tensor in of_full.items():
        assert of_half[name].dtype == torch.float16
        torch.testing.assert_close(of_half[name], tensor.to(torch.float16))
    assert half.explained_variance == pytest.approx(full.explained_variance, abs=1e-3)
    saes = SAESet.load(SAESource(path=str(tmp_path / "half")), model_config=model.config, model_name="tiny")
    assert saes[1].W_dec_FD.dtype == torch.float32


def test_finished_layers_are_not_trained_again(tmp_path, tokenizer, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)  # whatever level another test has set
    model, texts = make_llama(), make_texts()
    first = train_saes(model, tokenizer, texts, [1], output_dir=tmp_path / "a", **SMALL)
    both = train_saes(model, tokenizer, texts, [0, 1], output_dir=tmp_path / "b", **SMALL)
    assert first[1].input_hash == both[1].input_hash
    assert same_weights(tmp_path / "a" / "layer_1", tmp_path / "b" / "layer_1")  # the other layer makes no difference

    def never(self, hidden_TD):
        raise Killed

    monkeypatch.setattr(LayerTrainer, "train", never)
    assert train_saes(model, tokenizer, texts, [1], output_dir=tmp_path / "a", **SMALL) == first
    assert not caplog.records
    changes: dict[str, Any]
    for changes in ({"seed": 1}, {"k": 9}, {"model_name": "other"}):
        with pytest.raises(InputError, match=r"layer_1 holds an SAE of another model, text or options \(different: "):
            train_saes(model, tokenizer, texts, [1], output_dir=tmp_path / "a", **SMALL | changes)
        with pytest.raises(Killed):
            train_saes(model, tokenizer, texts, [1], output_dir=tmp_path / "a", overwrite=True, **SMALL | changes)
    with pytest.raises(InputError, match=r"\(different: tokens\);\n"):
        train_saes(model, tokenizer, texts[::-1], [1], output_dir=tmp_path / "a", **SMALL)
    with pytest.raises(InputError, match=r"\(different: model\);\n"):
        train_saes(make_gemma2(), tokenizer, texts, [1], output_dir=tmp_path / "a", **SMALL)
    file = tmp_path / "a" / "layer_1" / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(InputError, match="damaged"):
        train_saes(model, tokenizer, texts, [1], output_dir=tmp_path / "a", **SMALL)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": [3]}, "layer 3 is out of range; choose 0 to 2"),
        ({"layers": []}, "at least one"),
        ({"layers": [1, 1]}, "each once"),
        ({"k": 65}, "k is 65, but there are only d_sae 64"),
        ({"d_sae": 0}, "d_sae is 0"),
        ({"k": 0}, "k is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"architecture": "relu"}, "architecture is 'relu', which is not one of: topk, jumprelu"),
        ({"n_tokens": 50}, "less than one batch"),
        ({"context_size": 1}, "context_size is 1"),
        ({"n_token": 500}, "no option 'n_token' of SAE trainings; did you mean 'n_tokens'"),
        ({"texts": []}, "no text"),
        ({"texts": ["", ""]}, "no text"),
        ({"texts": ["w1", None]}, "row 1 is NoneType .*, not text: choose"),
        ({"texts": [{"text": "w1"}]}, "row 0 is dict .*, not text, or token ids"),
        ({"texts": ["w1 w2 w3", "w4"]}, "too little text"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path, tokenizer, changes, said):
    options = {"texts": make_texts(100), "layers": [0], "output_dir": tmp_path / "out"} | SMALL | changes
    with pytest.raises(InputError, match=said) as error:
        train_saes(make_llama(), tokenizer, **options)
    assert len(str(error.value).splitlines()) <= 3
    assert not (tmp_path / "out").exists()


def test_a_diverged_sae_is_not_written(tmp_path, tokenizer):
    with pytest.raises(InputError, match="diverged at lr"):
        train_saes(make_llama(), tokenizer, make_texts(), [0], output_dir=tmp_path, lr=1e30, **SMALL)
    assert not (tmp_path / "layer_0").exists()


def test_other_peoples_folders_and_files_are_left_alone(tmp_path, tokenizer):
    (tmp_path / "layer_0").mkdir()
    with pytest.raises(InputError, match="was not written here"):
        train_saes(make_llama(), tokenizer, make_texts(), [0], output_dir=tmp_path, **SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        train_saes(make_llama(), tokenizer, make_texts(), [0], output_dir=tmp_path / "file" / "x", **SMALL)


def test_a_pretrained_model_on_real_text(tmp_path, shared):
    path = shared / "models" / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(path)
    with gzip.open(shared / "data" / "hh_rlhf" / "harmless-base.test.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["chosen"] for line in itertools.islice(file, 1000)]
    reports = train_saes(
        model,
        AutoTokenizer.from_pretrained(path),
        texts,
        [1, 3],
        d_sae=256,
        k=32,
        n_tokens=80_000,
        eval_tokens=20_000,
        output_dir=tmp_path,
        model_name=str(path),
        progress=False,
    )
    for report in reports.values():
        assert report.explained_variance > 0.9
        assert report.dead_fraction < 0.05
        assert report.loss_recovered is not None
        assert report.loss_recovered > 0.95
    saes = SAESet.load(SAESource(path=str(tmp_path)), model_config=model.config, model_name=str(path))
    assert list(saes) == [1, 3]


def test_names_on_the_card_are_text() -> None:
    metadata = {"model_name": "a`<img src=x>|b", "dataset_path": "c`\n# d"}
    report = {**dict.fromkeys(QUALITY), "layer": 1, "eval_tokens": 10}
    text = card_of(report, SAETrainingOptions(), metadata)
    assert "of `a'<img src=x>¦b`" in text
    assert "on `c'?# d`" in text
