"""Small random models of the real classes, and what they need to be trained on."""

import torch


def tiny_config(model_type, num_labels=2):
    from transformers import AutoConfig
    s = dict(vocab_size=200, num_labels=num_labels, pad_token_id=0)
    enc = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    none = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    kw = {
        "bert": {**enc, **none}, "roberta": {**enc, **none}, "xlm-roberta": {**enc, **none},
        "electra": {**enc, **none, "embedding_size": 16},
        "distilbert": dict(dim=32, n_layers=3, n_heads=4, hidden_dim=48, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0),
        "llama": {**enc, "num_key_value_heads": 2, "bos_token_id":1,"eos_token_id":2}, "phi3": {**enc, "num_key_value_heads": 2,"bos_token_id":1,"eos_token_id":2},
        "gpt_neox": {**enc,"bos_token_id":1,"eos_token_id":2}, "gpt2": dict(n_embd=32, n_layer=3, n_head=4, n_inner=48, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,bos_token_id=1,eos_token_id=2),
    }[model_type]
    return AutoConfig.for_model(model_type, **s, **kw)


def tiny_model(model_type, num_labels=2, seed=0):
    from transformers import AutoModelForSequenceClassification
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(tiny_config(model_type, num_labels)).eval()
