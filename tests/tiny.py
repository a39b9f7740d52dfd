"""Small random models of the real classes, and what they need to be trained on."""

import csv
import random

VOCABULARY = 200
_ENCODER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
_BERT = {**_ENCODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_DECODER = {**_ENCODER, "bos_token_id": 1, "eos_token_id": 2}
_CONFIGS = {
    "bert": _BERT,
    "roberta": {**_BERT, "max_position_embeddings": 130},
    "xlm-roberta": {**_BERT, "max_position_embeddings": 130},
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
    "llama": {**_DECODER, "num_key_value_heads": 2},
    "phi3": {**_DECODER, "num_key_value_heads": 2},
    "gpt_neox": _DECODER,
    "gpt2": {
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 48,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
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
    """A configuration of 3 layers, 4 heads, 48 neurons, dropout 0."""
    from transformers import AutoConfig

    values = {"vocab_size": VOCABULARY, "num_labels": num_labels, "pad_token_id": 0, **_CONFIGS[model_type], **changes}
    return AutoConfig.for_model(model_type, **values)


def tiny_model(model_type, num_labels=2, seed=0, **changes):
    """A random sequence classifier in evaluation mode."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(tiny_config(model_type, num_labels, **changes)).eval()


def tiny_tokenizer(folder):
    """A word-level tokenizer for the words of `tiny_data`, saved to `folder`."""
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
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)
    fast.model_input_names = ["input_ids", "attention_mask"]
    fast.save_pretrained(folder)
    return fast


def tiny_folder(folder, model_type, seed=0, **changes):
    """A local checkpoint as from the hub: the encoder's weights without a head, and a tokenizer."""
    model = tiny_model(model_type, seed=seed, **changes)
    model.base_model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def tiny_data(folder, n_train=96, n_dev=40, regression=False):
    """train.csv and validation.csv with sentence1, sentence2, label; good and bad words decide."""
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
                label = round(2.5 * (i % 2) + draw.random(), 3) if regression else kind
                writer.writerow([" ".join(words), " ".join(draw.choices(_WORDS["plain"], k=4)), label])
    return folder
