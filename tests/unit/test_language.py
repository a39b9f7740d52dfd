"""Language modelling: what is learnt of a row, each sequence's own mean, and law 2 for it."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from prunadapt_ds import adapters, files, gates, token_teacher
from prunadapt_ds.batches import Rows
from prunadapt_ds.commands import evaluate
from prunadapt_ds.config import parse
from prunadapt_ds.data import compute_perplexity, language, load_language, tokenize_language
from prunadapt_ds.errors import UserError
from prunadapt_ds.importance import STATISTICS, Recorder
from prunadapt_ds.models.families import FAMILIES
from prunadapt_ds.objective import TopTokens, losses_and_distillation, sample_losses
from prunadapt_ds.session import Session
from tests.tiny import VOCABULARY, layout_and_structure, tiny_config, tiny_instructions, tiny_tokenizer

pytestmark = pytest.mark.fast
DECODERS = [name for name, family in FAMILIES.items() if family.is_decoder]


def data_options(folder, suffix="jsonl"):
    files = ["--train_file", str(folder / f"train.{suffix}"), "--validation_file", str(folder / f"validation.{suffix}")]
    return parse(["--task_type", "causal_lm", *files]).data


def test_a_text_cannot_be_cut_by_examples(tmp_path):
    options = data_options(tiny_instructions(tmp_path), "txt")
    options.max_train_samples = options.max_eval_samples = 3
    with pytest.raises(UserError) as refused:
        load_language(options)
    assert [p.field for p in refused.value.problems] == ["max_train_samples", "max_eval_samples"]


def test_a_teacher_comes_along(tmp_path):
    source, folder = tmp_path / "old" / "teacher", tmp_path / "new" / "teacher"
    token_teacher.bring(source, folder)
    assert not folder.exists(), "there is none"
    source.mkdir(parents=True)
    for name in ("part-0.safetensors", token_teacher.INDEX):
        (source / name).write_text(name)
    token_teacher.bring(source, folder)
    assert {p.name: p.read_text() for p in folder.iterdir()} == {p.name: p.name for p in source.iterdir()}
    (folder / token_teacher.INDEX).write_text("its own")
    token_teacher.bring(source, folder)
    assert (folder / token_teacher.INDEX).read_text() == "its own"


@pytest.fixture
def rows(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path, of_decoder=True)
    tokenizer.pad_token = tokenizer.eos_token
    data = load_language(data_options(tiny_instructions(tmp_path / "data", n_train=8)))
    return Rows(tokenize_language(data.train, tokenizer, 32), tokenizer)


def test_only_responses_are_learnt(rows):
    for row, labels in zip(rows.tokens["input_ids"], rows.token_labels, strict=True):
        learnt = [label for label in labels if label >= 0]
        assert row[-len(learnt) :] == learnt and learnt[-1] == rows.tokenizer.eos_token_id
        assert labels[: -len(learnt)] == [-100] * (len(labels) - len(learnt))
        words = rows.tokenizer.decode(learnt[:-1]).split()
        assert set(words) <= {
            "sun",
            "joy",
            "love",
            "bright",
            "happy",
            "sweet",
            "rain",
            "pain",
            "hate",
            "dark",
            "sad",
            "sour",
        }
    batch = rows.batch([0, 3], 0.5)
    assert batch.labels.shape == batch.inputs["input_ids"].shape and batch.labels.shape[1] % 8 == 0
    assert (batch.labels[batch.inputs["attention_mask"] == 0] == -100).all()


def test_prompt_and_response_are_joined_as_they_are_written(tmp_path):
    """Also where a tokenizer begins every text with a space, as Llama 2's does."""
    letters = ["<unk>", "</s>", "\n", "\u2581", *"abdnsu"]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", model_max_length=64)
    pairs = {"prompt": ["bad ", "bad\n", "bad"], "response": ["sun", "sun", " sun"]}
    data = tokenize_language(Dataset.from_dict(pairs), fast, 64)
    joined = ["".join(letters[i] for i in ids) for ids in data["input_ids"]]
    assert joined == ["\u2581bad\u2581sun</s>", "\u2581bad\nsun</s>", "\u2581bad\u2581sun</s>"]


def test_a_chat_template_s_own_start_and_end_are_not_doubled(tmp_path):
    letters = ["[PAD]", "[UNK]", "<s>", "</s>", "sun", "joy"]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>", eos_token="</s>", model_max_length=64
    )
    pairs = {"prompt": ["sun", "<s> sun"], "response": ["joy", "joy </s>"]}
    assert tokenize_language(Dataset.from_dict(pairs), fast, 64)["input_ids"] == [[2, 4, 5, 3]] * 2


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONVERSATIONS = [
    [{"role": "user", "content": "sun"}, {"role": "assistant", "content": "joy"}],
    [
        {"role": "system", "content": "day"},
        {"role": "user", "content": "sun"},
        {"role": "assistant", "content": "joy", "name": "a key of its own"},
        {"role": "user", "content": "joy"},
        {"role": "assistant", "content": "sun"},
    ],
]


def conversational(template):
    """A tokenizer of words for `CONVERSATIONS`, with a chat template."""
    words = ["[UNK]", "</s>", "<user>", "<assistant>", "<system>", "sun", "joy", "day"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "</s>", "additional_special_tokens": words[2:5]}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=64, **special)
    fast.chat_template = template
    return fast


def conversations(tmp_path):
    text = "".join(json.dumps({"messages": messages, "source": "x"}) + "\n" for messages in CONVERSATIONS)
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(text)
    return load_language(data_options(tmp_path)).train


def test_the_last_answer_of_a_conversation_is_learnt(tmp_path):
    tokens = tokenize_language(conversations(tmp_path), conversational(TEMPLATE), 64)
    assert tokens["input_ids"] == [[2, 5, 1, 3, 6, 1], [4, 7, 1, 2, 5, 1, 3, 6, 1, 2, 6, 1, 3, 5, 1]]
    assert tokens["labels"] == [[-100] * 4 + [6, 1], [-100] * 13 + [5, 1]]


def test_a_template_that_rewrites_what_came_before(tmp_path):
    """Prompt and whole conversation then differ before the answer, whose own words are learnt."""
    template = "{% if add_generation_prompt %}day{% endif %}" + TEMPLATE
    tokens = tokenize_language(conversations(tmp_path), conversational(template), 64)
    assert tokens["input_ids"][0] == [7, 2, 5, 1, 3, 6, 1] and tokens["labels"][0] == [-100] * 5 + [6, 1]


def test_a_template_writes_the_same_date_on_any_day(tmp_path):
    """Ranks around midnight, and a run that is resumed another day."""
    template = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
    data, tokenizer = conversations(tmp_path), conversational(template)
    prompt, answer = language._as_pair(tokenizer, json.loads(data["messages"][0]))
    assert prompt.startswith("26 Jul 2024<user>") and answer == "joy</s>"
    assert "26 Jul 2024" not in tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False), "elsewhere it is today"


@pytest.mark.parametrize(
    "template, words", [(None, "has no chat template"), ("{{ raise_exception('roles must alternate') }}", "alternate")]
)
def test_conversations_that_cannot_be_spelt_out(tmp_path, template, words):
    with pytest.raises(UserError, match=words):
        tokenize_language(conversations(tmp_path), conversational(template), 64)


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_an_answer_without_words(tmp_path, content):
    """As in the rows of a tool call."""
    messages = [*CONVERSATIONS[0][:-1], {"role": "assistant", "content": content, "tool_calls": []}]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(UserError, match=r"row 1: the content of a message \(assistant\) is .*; write some text"):
        load_language(data_options(tmp_path))


@pytest.mark.parametrize("name", ["response", "completion", "output"])
def test_names_of_the_response(tmp_path, name):
    for file in ("train", "validation"):
        (tmp_path / f"{file}.jsonl").write_text(json.dumps({"prompt": "a", name: "b"}) + "\n")
    assert load_language(data_options(tmp_path)).train.to_dict() == {"prompt": ["a"], "response": ["b"], "index": [0]}


def test_text_is_cut_into_blocks(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path, of_decoder=True)
    data = load_language(data_options(tiny_instructions(tmp_path / "data"), "txt"))
    tokens = tokenize_language(data.train, tokenizer, 16)
    whole = [i for block in tokens["input_ids"] for i in block]
    text = (tmp_path / "data" / "train.txt").read_text()
    assert whole == tokenizer(text)["input_ids"][: len(whole)] and {len(b) for b in tokens["input_ids"][:-1]} == {16}
    assert tokens["labels"] == tokens["input_ids"]


def test_too_long_a_row_loses_the_beginning_of_its_prompt(tmp_path):
    from datasets import Dataset

    tokenizer = tiny_tokenizer(tmp_path, of_decoder=True)
    data = Dataset.from_dict({"prompt": ["the a one this that we"], "response": ["sun joy"]})
    (ids,) = tokenize_language(data, tokenizer, 5)["input_ids"]
    assert tokenizer.decode(ids[:-1]) == "that we sun joy" and ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "text, word", [('{"prompt": "a"}\n', "response"), ('{"prompt": "a", "response": " "}\n', "row 1"), ("", "empty")]
)
def test_files_that_cannot_be_learnt_from(tmp_path, text, word):
    folder = tiny_instructions(tmp_path)
    (folder / "train.jsonl").write_text(text)
    with pytest.raises(UserError, match=word):
        load_language(data_options(folder))


def test_loss_is_each_sequence_s_own_mean():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 11), torch.randint(0, 11, (3, 6))
    labels[0, :4], labels[1, :1], labels[2, :] = -100, -100, -100
    found = sample_losses(logits, labels, is_regression=False)
    for b in range(2):
        one = F.cross_entropy(logits[b, :-1], labels[b, 1:], ignore_index=-100)
        torch.testing.assert_close(found[b], one)
    assert found[2] == 0, "nothing to learn"


@pytest.mark.parametrize("pad_token", ["[PAD]", None])
def test_a_decoder_of_no_family_is_scored_as_row_by_row(tmp_path, pad_token, capsys):
    """Whatever its tokenizer pads with, and on which side."""
    config = AutoConfig.for_model(
        "bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, initializer_range=0.5
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "bloom")
    tokenizer = tiny_tokenizer(tmp_path / "bloom", of_decoder=True)
    stated = tmp_path / "bloom" / "tokenizer_config.json"
    stated.write_text(json.dumps(json.loads(stated.read_text()) | {"pad_token": pad_token, "padding_side": "left"}))
    data = tiny_instructions(tmp_path / "data")
    files = [f"--{name}_file={data / f'{name}.jsonl'}" for name in ("train", "validation")]
    argv = ["--task_type=causal_lm", f"--model_name_or_path={tmp_path / 'bloom'}", *files, "--max_seq_length=32"]
    assert evaluate.main(argv) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    losses = []
    for row in tokenize_language(load_language(data_options(data)).validation["validation"], tokenizer, 32):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        losses.append(F.cross_entropy(model(ids).logits[0, :-1], labels[1:], reduction="none")[labels[1:] >= 0])
    assert said["perplexity"] == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-4)


def test_perplexity_weighs_tokens():
    found = compute_perplexity(np.array([[2.0, 1.0], [3.0, 4.0]]))
    assert found == {"perplexity": pytest.approx(math.e), "score": pytest.approx(math.e)}
    with pytest.raises(UserError, match="diverged"):
        compute_perplexity(np.array([[math.nan, 1.0]]))


def language_model(model_type):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval().requires_grad_(False)
    layout, structure = layout_and_structure(model, 16)
    adapters.add_lora(model, layout, adapters.target_modules(layout), r=2, lora_alpha=4)
    recorder = Recorder(structure.num_units, activations=True)
    gates.attach(model, layout, structure, recorder)
    return model, recorder


def scores(model, recorder, rows, chunks):
    for chunk in chunks:
        batch = rows.batch(chunk, 1 / len(chunk))
        recorder.begin(batch.weights, batch.inputs["attention_mask"])
        losses = sample_losses(model(**batch.inputs).logits, batch.labels, is_regression=False)
        (losses * batch.weights).sum().backward()
        recorder.end()
    return recorder.all_reduce()


@pytest.mark.parametrize("model_type", DECODERS)
def test_scores_are_the_same_for_every_split_and_autograd_s(rows, model_type):
    model, recorder = language_model(model_type)
    whole = scores(model, recorder, rows, [list(range(8))])
    split = scores(model, recorder, rows, [[0, 1, 2, 3, 4], [5, 6], [7]])
    for name in STATISTICS:
        torch.testing.assert_close(whole.sums[name], split.sums[name], rtol=1e-3, atol=1e-9)
    slow = torch.zeros_like(whole.sums["grad_sq"])
    for i in range(8):  # one sequence at a time: the gradient of delta where delta is 0 is that of the mask
        model.zero_grad()
        batch = rows.batch([i], 1.0)
        sample_losses(model(**batch.inputs).logits, batch.labels, is_regression=False).sum().backward()
        slow += torch.cat([g.delta.grad for g in gates.gates_of(model)]).square()
    torch.testing.assert_close(whole.sums["grad_sq"], slow, rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize(
    "argv, field",
    [
        ([], "train_file"),
        (["--method", "tmp"], "method"),
        (["--distill_weight", "0.5"], "distill_weight"),
    ],
)
def test_what_language_does_not_go_with(argv, field):
    with pytest.raises(UserError) as caught:
        parse(["--task_type", "causal_lm", *argv])
    assert field in {p.field for p in caught.value.problems}


def test_a_teacher_of_words_is_a_language_model_s():
    with pytest.raises(UserError, match="no effect with --task_type sequence_classification"):
        parse(["--distill_top_k", "4"])
    few = ["--task_type", "causal_lm", "--train_file", "a.txt", "--validation_file", "b.txt", "--distill_top_k", "4"]
    assert parse(few).prune.distill_weight == 0.5 and parse(few[:-2]).prune.distill_weight == 0


def test_all_words_kept_is_the_whole_divergence():
    """With k = V nothing is left for others: sample by sample the loss is the one of all logits, token by token."""
    torch.manual_seed(0)
    labels = torch.tensor([[-100, 3, 4, -100], [2, 0, 1, 1], [5, -100, -100, -100]])
    logits, teacher = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    real = labels[:, 1:] >= 0
    top = teacher[:, :-1][real].log_softmax(-1).topk(6)
    found = sample_losses(
        logits, labels, is_regression=False, teacher=TopTokens(top.indices, top.values), distill_weight=0.7
    )
    for row in range(3):
        tokens = []
        for t in range(3):
            if labels[row, t + 1] < 0:
                continue
            student, theirs = logits[row, t].log_softmax(-1), teacher[row, t].log_softmax(-1)
            weight = 0.7 * theirs.exp()[labels[row, t + 1]]
            divergence = (theirs.exp() * (theirs - student)).sum()
            tokens.append((1 - weight) * -student[labels[row, t + 1]] + weight * divergence)
        expected = torch.stack(tokens).mean() if tokens else torch.zeros(())
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_of_few_words_the_others_are_one_outcome():
    teacher = TopTokens(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.3]]).log())
    student = torch.tensor([0.1, 0.2, 0.4, 0.3])
    logits, labels = student.log().expand(1, 2, 4), torch.tensor([[-100, 0]])
    found = sample_losses(logits, labels, is_regression=False, teacher=teacher, distill_weight=1.0)
    divergence = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.1) + 0.2 * math.log(0.2 / 0.5)
    assert float(found) == pytest.approx(0.7 * -math.log(0.1) + 0.3 * divergence, rel=1e-4), (
        "trust: 0.3 for the right word"
    )
    _, apart = losses_and_distillation(logits, labels, teacher, is_regression=False, distill_weight=0.1)
    assert float(apart) == pytest.approx(divergence, rel=1e-4), "whatever the weight"
    unknown = sample_losses(logits, torch.tensor([[-100, 3]]), is_regression=False, teacher=teacher, distill_weight=1.0)
    assert float(unknown) == pytest.approx(-math.log(0.3)), "a teacher that does not name the word is not followed"


@pytest.mark.parametrize("size", [token_teacher.PART_BYTES, 100])
def test_the_teacher_s_words_are_found_again(rows, tmp_path, monkeypatch, size):
    """By any rows in any order, and by a later process; each token's own, with the likeliest first."""
    monkeypatch.setattr(token_teacher, "PART_BYTES", size)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    folder = tmp_path / "teacher"
    written = token_teacher.write(model, rows, 3, 2, torch.device("cpu"), folder)
    positions = [5, 0, 5, 7]
    for teacher in (written, token_teacher.open_again(folder, written.identity)):
        found, expected = teacher.answers(positions), []
        for i in positions:
            batch = rows.batch([i], 1.0)
            with torch.no_grad():
                logits = model(**batch.inputs).logits
            expected.append(logits[:, :-1][batch.labels[:, 1:] >= 0].log_softmax(-1).topk(3))
        assert torch.equal(found.words, torch.cat([top.indices for top in expected]))
        torch.testing.assert_close(found.log_probs, torch.cat([top.values for top in expected]), rtol=2e-3, atol=2e-3)
    on_disk = sum(file.stat().st_size for file in folder.glob("part-*"))
    parts = len(list(folder.glob("part-*")))
    assert (parts > 2) == (size == 100)
    assert token_teacher.num_bytes(rows, 3) <= on_disk <= token_teacher.num_bytes(rows, 3) + 500 * parts


def test_words_of_another_rank_that_cannot_be_read_are_said_at_once(rows, tmp_path, monkeypatch):
    def missing(self):
        raise FileNotFoundError(2, "No such file or directory", "part-1.safetensors")

    monkeypatch.setattr(token_teacher.TokenTeacher, "open_all", missing)
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    with pytest.raises(UserError, match=r"part-1\.safetensors.*name a folder that all hosts share"):
        token_teacher.write(model, rows, 3, 2, torch.device("cpu"), tmp_path / "teacher")


def test_a_row_without_a_token_to_learn_has_no_words(tmp_path):
    one = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100] * 3}
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer", of_decoder=True)
    tokenizer.pad_token = tokenizer.eos_token
    rows = Rows(Dataset.from_list([one]), tokenizer)
    model, folder = AutoModelForCausalLM.from_config(tiny_config("llama")).eval(), tmp_path / "teacher"
    written = token_teacher.write(model, rows, 3, 2, torch.device("cpu"), folder)
    assert token_teacher.open_again(folder, written.identity).answers([0]).words.shape == (0, 3)


DAMAGES = ["gone", "cut short", "flipped"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [token_teacher.INDEX, token_teacher.part(0)])
def test_a_teacher_that_is_not_whole_is_refused_before_any_step(rows, tmp_path, name, damage):
    model, folder = AutoModelForCausalLM.from_config(tiny_config("llama")).eval(), tmp_path / "teacher"
    identity = token_teacher.write(model, rows, 3, 2, torch.device("cpu"), folder).identity
    content = bytearray((folder / name).read_bytes())
    content[-5] ^= 1
    (folder / name).unlink()
    if damage != "gone":
        (folder / name).write_bytes(content[: len(content) // 2] if damage == "cut short" else content)
    why = "is missing" if damage == "gone" else "was cut short or changed"
    with pytest.raises(UserError, match=rf"output_dir=.*{name} {why}.*--resume never"):
        token_teacher.open_again(folder, identity)


def test_a_teacher_s_files_appear_whole(rows, tmp_path, monkeypatch):
    """Forced to the disk under another name, the index after all others."""
    synced, plain = [], files.sync
    monkeypatch.setattr(files, "sync", lambda path: (synced.append(path.name), plain(path)))
    model, folder = AutoModelForCausalLM.from_config(tiny_config("llama")).eval(), tmp_path / "teacher"
    token_teacher.write(model, rows, 3, 2, torch.device("cpu"), folder)
    shard, index = token_teacher.part(0), token_teacher.INDEX
    assert synced == [f".{shard}.tmp", "teacher", f".{index}.tmp", "teacher"]
    assert {p.name for p in folder.iterdir()} == {shard, index}


def test_a_teacher_for_whom_there_is_no_room_is_every_rank_s_error(rows, tmp_path, monkeypatch):
    def full(tensors, file, metadata):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    with pytest.raises(UserError, match="make room"):
        token_teacher.write(model, rows, 3, 2, torch.device("cpu"), tmp_path / "teacher")


@pytest.mark.parametrize(
    "given, micro_batch_size, size",
    [
        ([], 2, 2),
        ([], 32, 8),  # the logits of a vocabulary are large
        (["--per_device_eval_batch_size", "16"], 2, 16),
    ],
)
def test_evaluation_takes_no_more_texts_than_training(given, micro_batch_size, size):
    files = ["--train_file", __file__, "--validation_file", __file__]
    sampler = SimpleNamespace(micro_batch_size=micro_batch_size)
    for task, expected in (("causal_lm", size), ("sequence_classification", 16 if given else 64)):
        config = parse([*given, "--task_type", task, *files])
        assert Session.eval_batch_size.fget(SimpleNamespace(config=config, sampler=sampler)) == expected
