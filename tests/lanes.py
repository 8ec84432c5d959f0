"""The lanes of tests. `pytest -m quick` runs one in less than a minute, and every file of tests is in one of three.

`conftest.py` marks the quick ones, and lets none of them take `MOST` seconds of the processor; the files of `SLOW` are
not even imported for `-m quick`. A new file goes into one of the tables below: `tests/test_lanes.py` asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

MOST: Final = 5.0
"""More seconds of the processor than a quick test takes on a slow machine: on a usual one none of them takes 2."""

QUICK: Final = frozenset({
    "bigger", "caching", "catalogue", "errors", "exports", "hub", "lanes", "likeliest", "llm_drafter", "logits", "loop",
    "margins", "observe", "parts", "predictor", "prefix", "processors", "recycling", "regret", "retrieval",
    "verification", "wishes",
})  # fmt: skip
"""Files all of whose tests are quick."""

PARTS: Final[Mapping[str, frozenset[str]]] = {
    "accelerate": frozenset({
        "test_an_inner_dimension_is_cut_until_rows_do_not_depend_on_their_number",
        "test_rollback_is_a_number",
        "test_the_given_model_stays_as_it_is",
        "test_weights_of_8_bits",
    }),
    "certificate": frozenset({
        "test_decoders_are_exact[autoregressive]",
        "test_decoders_are_exact[certain drafts, block verification]",
        "test_decoders_are_exact[sampled drafts, token rejection, gamma 2]",
        "test_decoders_are_exact[suffix]",
        "test_every_rule_is_exact_on_drawn_trees[a lookup behind a tree-traversal]",
        "test_a_seed_has_one_text[certain drafts]",
        "test_mistakes_are_refused[a stop token inside the block is overlooked]",
        "test_mistakes_are_refused[a wrong residual: p without the draft, though it was sampled]",
        "test_mistakes_are_refused[block verification that stops at the first failure]",
        "test_mistakes_are_refused[one uniform rejects the draft and draws its replacement]",
        "test_mistakes_are_refused[siblings of a tree judged one by one by p]",
        "test_mistakes_are_refused[the bonus token drawn from the row before]",
        "test_a_mistake_is_shown_with_both_probabilities",
        "test_noise_at_different_positions_is_independent",
        "test_other_randomness_is_noticed",
    }),
    "constraints": frozenset({
        "test_a_matcher_is_a_function_of_the_text",
        "test_an_engine_goes_back_by_what_is_not_shared",
        "test_an_end_inside_a_draft",
        "test_an_incomplete_text_cannot_stop_and_a_complete_one_may",
        "test_what_cannot_be_obeyed_is_refused_by_name",
        "test_what_is_no_grammar_is_refused_at_once",
    }),
    "combine": frozenset({"test_associative_with_a_unit", "test_at_most", "test_what_each_combination_says"}),
    "cost_aware": frozenset({"test_stalls_move_nothing"}),
    "docs": frozenset({"test_docstring_examples_run", "test_each_promise_names_a_test_that_exists"}),
    "exactness": frozenset({
        "test_short_lengths",
        "test_the_first_of_several_eos_ids_ends_the_text",
        "test_drafter_and_target_of_different_dtypes",
        "test_nothing_the_caller_passed_in_is_changed",
    }),
    "gamma": frozenset({"test_greedy_decoding_with_egag_is_greedy", "test_certain_trees_leave_a_seed_its_text"}),
    "heads": frozenset({
        "test_a_head_is_fed_what_is_new",
        "test_a_head_that_looks_at_one_place_asks_for_one_row",
        "test_a_tree_is_made_as_far_as_it_is_pulled",
        "test_a_wrong_checkpoint_is_refused_by_name",
        "test_each_layout_says_what_its_paper_says",
        "test_what_is_interrupted_leaves_no_wrong_memo",
        "test_what_is_no_checkpoint_is_refused",
    }),
    "house": frozenset({
        "test_every_room_has_a_floor",
        "test_no_tensor_is_of_a_dtype_that_somebody_else_chose",
        "test_no_room_imports_upwards",
        "test_only_those_who_read_models_know_transformers",
    }),
    "laws": frozenset({
        "test_observing_is_identity",
        "test_drafting_nothing_is_autoregressive",
        "test_a_models_memo_is_invisible_and_pruning_it_is_identity",
        "test_statistics_that_do_not_add_up_are_refused",
    }),
    "stop": frozenset({
        "test_it_ends_where_the_whole_text_first_holds_a_string",
        "test_behind_a_stop_string_it_ends_at_the_next_one",
    }),
    "strict": frozenset({
        "test_a_strict_automaton_hears_of_nothing_that_it_forbids",
        "test_a_drafter_is_not_asked_behind_a_stop_token_and_neither_is_its_processor",
        "test_an_accepted_stop_token_is_the_last_and_has_no_token_behind_it",
        "test_laws_are_made_once_each_behind_those_before",
    }),
    "suffix": frozenset({"test_endless_repetition_still_gives_a_longest_match", "test_threads_share_a_drafter"}),
    "trees": frozenset({
        "test_a_memo_reads_trees_as_it_reads_their_paths",
        "test_a_greedy_model_drafts_its_best_tokens_level_by_level",
        "test_trees_see_through_sliding_windows",
        "test_sampled_text_depends_on_the_seed_alone",
    }),
}  # fmt: skip
"""Files of which these tests are quick, by name, or by name and parameters."""

SLOW: Final = frozenset({
    "architectures", "batch", "batch_laws", "batch_mutants", "beam", "bench", "caches", "captured", "chances",
    "chat", "cli", "commands", "composing", "conformance", "converted", "copies", "corpus", "device", "distill",
    "early", "edges", "examples", "features", "gallery", "grammars", "interop", "interop_generate",
    "interop_processors", "llama_cpp", "llama_cpp_batch", "lm_eval", "lookup", "matrix", "models", "ngram",
    "notebooks", "one_seed", "quantized", "random_models", "ray", "replay", "seed_and_clock", "seeds", "server", "site",
    "spec", "spec_paths", "storage", "surface", "trace", "transactions", "typing", "untouched",
    "vocabularies", "wrappers",
})  # fmt: skip
"""Files without a quick test: they decode a lot, load real models or start processes."""


def is_quick(file: str, test: str) -> bool:
    """Whether the test of a file, `test_` and `.py` left out, is in the quick lane."""
    some = PARTS.get(file, frozenset())
    return file in QUICK or test in some or test.partition("[")[0] in some
