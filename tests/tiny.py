"""Small random models of the real classes, and what they need to be trained on."""

import csv
import json
import random

VOCABULARY = 200
_ENCODER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
_BERT = {**_ENCODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_DECODER = {**_ENCODER, "bos_token_id": 2, "eos_token_id": 3}
_CONFIGS = {
    "bert": _BERT,
    "roberta": {**_BERT, "max_position_embeddings": 130},
    "xlm-roberta": {**_BERT, "max_position_embeddings": 130},
    "camembert": {**_BERT, "max_position_embeddings": 130},
    "electra": {**_BERT, "embedding_size": 16},
    "distilbert": {
        "dim": 32,
        "n_layers": 3,
        "n_heads": 4,
        "hidden_dim": 48,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
    "deberta-v2": {
        **_BERT,
        "relative_attention": True,
        "position_buckets": 4,
        "max_relative_positions": 16,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
        "pooler_hidden_size": 32,
    },
    "modernbert": {
        **_ENCODER,
        "local_attention": 8,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "albert": {**_BERT, "embedding_size": 16, "num_hidden_layers": 4, "inner_group_num": 2, "num_hidden_groups": 1},
    "llama": {**_DECODER, "num_key_value_heads": 2},
    "mistral": {**_DECODER, "num_key_value_heads": 2, "sliding_window": 6},
    "qwen2": {
        **_DECODER,
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {**_DECODER, "num_key_value_heads": 2, "head_dim": 12},
    "gemma": {**_DECODER, "num_key_value_heads": 2, "head_dim": 12},
    "gemma3_text": {
        **_DECODER,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "smollm3": {**_DECODER, "num_key_value_heads": 2, "no_rope_layers": [1, 0, 1]},
    "phi3": {**_DECODER, "num_key_value_heads": 2},
    "gpt_neox": {**_DECODER, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 130,
        "dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 48,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
}
# Ways of a family that are laid out differently: name -> (family, changes).
VARIANTS = {
    "llama-mqa": ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "phi3-mqa": ("phi3", {"num_key_value_heads": 1}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "deberta-v2-own-positions": (
        "deberta-v2",
        {"share_att_key": False, "position_biased_input": True, "type_vocab_size": 2, "conv_kernel_size": 3},
    ),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
}
_WORDS = {
    "good": ["sun", "joy", "love", "bright", "happy", "sweet", "calm", "gift", "smile", "warm"],
    "bad": ["rain", "pain", "hate", "dark", "sad", "sour", "storm", "loss", "frown", "cold"],
    "plain": [
        "the",
        "a",
        "one",
        "this",
        "that",
        "we",
        "they",
        "it",
        "is",
        "was",
        "and",
        "near",
        "house",
        "road",
        "day",
        "man",
        "cat",
        "tree",
        "book",
    ],
}


def tiny_config(model_type, num_labels=2, **changes):
    """A configuration of 3 layers, 4 heads, 48 neurons, dropout 0, of a family or a variant."""
    from transformers import AutoConfig

    model_type, more = VARIANTS.get(model_type, (model_type, {}))
    changes = {**more, **changes}
    values = {"vocab_size": VOCABULARY, "num_labels": num_labels, "pad_token_id": 0, **_CONFIGS[model_type], **changes}
    return AutoConfig.for_model(model_type, **values)


def tiny_model(model_type, num_labels=2, seed=0, **changes):
    """A random sequence classifier in evaluation mode."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    config = tiny_config(model_type, num_labels, **changes)
    return AutoModelForSequenceClassification.from_config(config).eval()


def tiny_language_model(model_type, seed=0, **changes):
    """A random causal language model in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).eval()


def layout_and_structure(model, seq_length):
    """The layout of a model's family, and its measured structure."""
    from prunadapt_ds.models.layouts import family_of, layout_of
    from prunadapt_ds.models.structure import structure_of

    layout = layout_of(family_of(model.config), model.config, model.base_model_prefix)
    return layout, structure_of(model, layout, seq_length)


def tiny_tokenizer(folder, *, of_decoder=False):
    """A word-level tokenizer for the words of `tiny_data`, saved to `folder`.

    A decoder's adds no special tokens and knows no padding, as GPT-2's and Llama's.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + sorted(word for group in _WORDS.values() for word in group)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    if of_decoder:
        tokenizer.post_processor = None
        names = {"unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)
    fast.model_input_names = ["input_ids", "attention_mask"]
    fast.save_pretrained(folder)
    return fast


def exchange_two_words(folder):
    """Another tokenizer for the same model: two words have each other's number."""
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    words = values["model"]["vocab"]
    words["sun"], words["rain"] = words["rain"], words["sun"]
    file.write_text(json.dumps(values))


def tiny_folder(folder, model_type, seed=0, **changes):
    """A local checkpoint as from the hub: the encoder's weights without a head, and a tokenizer."""
    from prunadapt_ds.models.families import FAMILIES

    model = tiny_model(model_type, seed=seed, **changes)
    model.base_model.save_pretrained(folder)
    tiny_tokenizer(folder, of_decoder=FAMILIES[model.config.model_type].is_decoder)
    return folder


def tiny_data(folder, n_train=96, n_dev=40, regression=False, factor=1.0, shift=0.0):
    """train.csv and validation.csv with sentence1, sentence2, label; good and bad words decide; numbers are factor * x + shift."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for name, count in (("train", n_train), ("validation", n_dev)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence1", "sentence2", "label"])
            for i in range(count):
                kind = ("bad", "good")[i % 2]
                words = draw.choices(_WORDS["plain"], k=draw.randint(2, 8)) + draw.choices(_WORDS[kind], k=3)
                draw.shuffle(words)
                label = factor * round(2.5 * (i % 2) + draw.random(), 3) + shift if regression else kind
                writer.writerow([" ".join(words), " ".join(draw.choices(_WORDS["plain"], k=4)), label])
    return folder


def tiny_language_folder(folder, model_type, **changes):
    """A causal language model as from the hub, and its tokenizer."""
    tiny_language_model(model_type, **{"initializer_range": 0.2, **changes}).save_pretrained(folder)
    tiny_tokenizer(folder, of_decoder=True)
    return folder


def tiny_instructions(folder, n_train=24, n_dev=9):
    """train.jsonl and validation.jsonl with prompt and response, and train.txt and validation.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for name, count in (("train", n_train), ("validation", n_dev)):
        rows = []
        for i in range(count):
            kind = ("bad", "good")[i % 2]
            prompt = " ".join(draw.choices(_WORDS["plain"], k=draw.randint(1, 7)) + draw.choices(_WORDS[kind], k=1))
            rows.append({"prompt": prompt, "response": " ".join(_WORDS[kind][: draw.randint(1, 6)])})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.txt").write_text("\n".join(f"{row['prompt']} {row['response']}" for row in rows))
    return folder


def tiny_glue(folder, tasks=("rte", "wnli"), n_train=48, n_dev=24):
    """Files in the layout of GLUE's own pairs, from the words of `tiny_data`."""
    draw = random.Random(1)
    for task in tasks:
        labels = {"rte": ("not_entailment", "entailment")}.get(task, ("0", "1"))
        (folder / task.upper()).mkdir(parents=True, exist_ok=True)
        for name, count in (("train", n_train), ("dev", n_dev)):
            header = {"mrpc": "#1 ID\t#1 String\t#2 String\tQuality"}
            lines = [header.get(task, "index\tsentence1\tsentence2\tlabel")]
            for i in range(count):
                words = draw.choices(_WORDS["plain"], k=4) + draw.choices(_WORDS[("bad", "good")[i % 2]], k=3)
                lines.append(f"{i}\t{' '.join(words)}\t{' '.join(draw.choices(_WORDS['plain'], k=3))}\t{labels[i % 2]}")
            (folder / task.upper() / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder
