"""Fields of StreamGenerateRequest that the engines honour."""

ALONE = frozenset(
    {
        "text",
        "token_ids",
        "messages",
        "add_special_tokens",
        "truncate_prompt_tokens",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "seed",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "no_repeat_ngram_size",
        "logit_bias",
        "allowed_token_ids",
        "bad_words",
        "max_new_tokens",
        "min_new_tokens",
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "ignore_eos",
        "max_time",
        "echo",
        "skip_special_tokens",
        "return_token_ids",
        "logprobs",
        "top_logprobs",
    }
)
"""Those that make sense for one request at a time: every engine's."""

BATCHED = ALONE | {
    "priority",
    "n",
    "best_of",
    "prompt_logprobs",
    "bypass_prefix_cache",
    "cache_salt",
}
"""Those of the batching engine."""
