"""Names that configs of the release, LAMDA-PILOT and PyCIL use, and what they mean here."""

BACKBONE_ALIASES = {
    "vit_base_patch16_224": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit_base_patch16_224_in21k": "vit_base_patch16_224.augreg_in21k",
    "pretrained_vit_b16_224": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "pretrained_vit_b16_224_in21k": "vit_base_patch16_224.augreg_in21k",
}

# keys of LAMDA-PILOT and PyCIL that configs of theirs carry: accepted, and a line in the log says what counts here
_NO_EXEMPLARS = "no old images are kept"
_FROZEN = "the backbone stays as it is, without prompts or adapters in it"
UNUSED_KEYS = {
    "memory_size": _NO_EXEMPLARS,
    "memory_per_class": _NO_EXEMPLARS,
    "fixed_memory": _NO_EXEMPLARS,
    "print_forget": "forgetting is always reported",
    "init_epoch": "the first task trains as the others do, epochs={epochs}",
    "init_lr": "the first task trains as the others do, lr={lr}",
    "init_milestones": "the first task trains as the others do, milestones={milestones}",
    "init_lr_decay": "scheduler=steplr divides the rate by ten in every task",
    "init_weight_decay": "the first task trains as the others do, weight_decay={weight_decay}",
    "tuned_epoch": "the number of epochs is epochs={epochs}",
    "lrate": "the learning rate is lr={lr}",
    "lrate_decay": "scheduler=steplr divides the rate by ten",
    "min_lr": "scheduler=cosine ends at 1e-8, as in the release",
    "reinit_optimizer": "every task starts with a new optimizer",
    "vpt_type": _FROZEN,
    "prompt_token_num": _FROZEN,
    "ffn_num": _FROZEN,
    "use_RP": "model_name=ranpac always projects on random features",
    "M": "model_name=ranpac has 10,000 random features",
}
