"""The 95 edge cases of streams and calls, and the tests that cover each."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
CASES: dict[int, tuple[str, ...]] = {
    1: (
        "client/test_streams.py::test_server_without_streams_is_unimplemented",
        "connection/test_client_stream_states.py::test_open_needs_streams_of_the_server_and_a_place",
    ),
    2: ("connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",),
    3: ("server/test_streams.py::test_client_that_uses_no_stream_gets_no_new_kind",),
    4: ("connection/test_client_stream_vectors.py::test_client_produces_expected_outcome_of_stream_vector",),
    5: ("connection/test_client_stream_vectors.py::test_client_produces_expected_outcome_of_stream_vector",),
    6: (
        "server/test_streams.py::test_open_of_unary_method_is_refused_with_its_shape",
        "client/test_streams.py::test_method_of_another_shape_is_refused_with_the_cure",
    ),
    7: ("server/test_streams.py::test_request_of_streaming_method_is_refused_with_its_shape",),
    8: (
        "connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",
        "server/test_streams.py::test_open_without_token_is_unauthenticated",
    ),
    9: ("server/test_streams.py::test_stream_without_credit_starts_and_waits",),
    10: ("connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",),
    11: ("connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",),
    12: (
        "connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",
        "connection/test_server_stream_states.py::test_state_and_input_give_next_state_and_action",
    ),
    13: ("server/test_streams.py::test_streams_beyond_max_open_are_refused_and_requests_go_on",),
    14: ("server/test_streams.py::test_open_beyond_max_streams_gets_its_answer",),
    15: ("server/test_streams.py::test_method_waits_at_its_yield_for_credit",),
    16: (
        "connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",
        "server/test_streams.py::test_one_byte_of_credit_allows_one_item",
        "connection/test_client_stream_vectors.py::test_client_produces_expected_outcome_of_stream_vector",
    ),
    17: ("server/test_streams.py::test_credit_of_zero_items_or_bytes_allows_nothing",),
    18: (
        "connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",
        "connection/test_server_stream_states.py::test_state_and_input_give_next_state_and_action",
        "connection/test_client_stream_states.py::test_state_and_input_give_next_state_and_action",
    ),
    19: ("connection/test_server_stream_states.py::test_state_and_input_give_next_state_and_action",),
    20: ("server/test_streams.py::test_items_for_a_client_that_does_not_read_are_bounded",),
    21: (
        "connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",
        "connection/test_server_stream_states.py::test_state_and_input_give_next_state_and_action",
    ),
    22: ("connection/test_server_stream_states.py::test_state_and_input_give_next_state_and_action",),
    23: ("connection/test_server_stream_states.py::test_state_and_input_give_next_state_and_action",),
    24: ("connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",),
    25: ("connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",),
    26: ("connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",),
    27: ("connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",),
    28: ("connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",),
    29: ("server/test_stream_items.py::test_item_that_does_not_suit_fails_the_stream_with_its_number",),
    30: ("connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",),
    31: ("server/test_stream_items.py::test_end_at_once_gives_no_items",),
    32: (
        "connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",
        "connection/test_server_stream_states.py::test_state_and_input_give_next_state_and_action",
    ),
    33: ("server/test_stream_items.py::test_client_that_has_ended_its_items_gets_all_of_the_server",),
    34: ("server/test_stream_items.py::test_late_items_are_dropped_and_one_more_is_fatal",),
    35: ("server/test_stream_items.py::test_late_items_are_dropped_and_one_more_is_fatal",),
    36: (
        "server/test_stream_items.py::test_late_items_are_not_those_of_another_stream",
        "connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",
    ),
    37: ("server/test_streams.py::test_cancel_while_method_waits_for_credit_closes_generator",),
    38: (
        "connection/test_client_stream_states.py::test_state_and_input_give_next_state_and_action",
        "connection/test_stream_schedules.py::test_random_schedules_neither_overrun_nor_deadlock",
    ),
    39: ("server/test_streams.py::test_rapid_open_and_cancel_in_one_read_runs_at_most_max_open_methods",),
    40: ("server/test_streams.py::test_method_that_ignores_cancellation_keeps_its_place",),
    41: ("connection/test_client_stream_states.py::test_state_and_input_give_next_state_and_action",),
    42: ("server/test_streams.py::test_deadline_between_two_items_cuts_the_stream",),
    43: ("connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",),
    44: (
        "server/test_streams.py::test_failing_method_sends_items_then_its_error",
        "client/test_streams.py::test_error_comes_after_the_items",
    ),
    45: ("server/test_streams.py::test_failing_method_sends_items_then_its_error",),
    46: ("server/test_streams.py::test_failing_method_sends_items_then_its_error",),
    47: (
        "server/test_streams.py::test_session_revoked_in_mid_stream_cuts_it_after_the_event",
        "client/test_streams.py::test_revoked_session_cuts_the_stream",
    ),
    48: ("server/test_streams.py::test_expired_session_cuts_its_streams_only",),
    49: (
        "server/test_streams.py::test_refreshed_session_keeps_its_streams_and_the_token_of_their_frames",
        "client/test_stream_scripts.py::test_frames_of_a_stream_keep_the_token_of_its_open_after_a_refresh",
    ),
    50: ("connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",),
    51: ("server/test_streams.py::test_closing_ones_own_session_is_answered_before_its_streams_are_cut",),
    52: (
        "server/test_streams.py::test_evicted_session_cuts_its_streams",
        "client/test_stream_scripts.py::test_replaced_session_ends_a_stream_and_the_client_does_not_come_back",
    ),
    53: ("server/test_streams.py::test_stream_counts_as_use_of_its_session",),
    54: ("server/test_streams.py::test_streams_go_on_while_tokens_cannot_be_checked",),
    55: ("server/test_streams.py::test_goaway_refuses_open_and_lets_streams_end",),
    56: ("server/test_streams.py::test_drain_timeout_cuts_streams",),
    57: ("server/test_streams.py::test_goaway_refuses_open_and_lets_streams_end",),
    58: ("client/test_stream_scripts.py::test_lost_connection_ends_a_stream_after_its_items",),
    59: ("client/test_stream_scripts.py::test_lost_connection_ends_a_stream_after_its_items",),
    60: ("client/test_stream_scripts.py::test_stale_open_is_opened_again_once",),
    61: (
        "connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",
        "connection/test_server_stream_states.py::test_state_and_input_give_next_state_and_action",
    ),
    62: (
        "connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",
        "connection/test_server_stream_states.py::test_state_and_input_give_next_state_and_action",
    ),
    63: (
        "connection/test_client_stream_vectors.py::test_client_produces_expected_outcome_of_stream_vector",
        "connection/test_client_stream_states.py::test_state_and_input_give_next_state_and_action",
    ),
    64: ("connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",),
    65: ("connection/test_client_stream_vectors.py::test_client_produces_expected_outcome_of_stream_vector",),
    66: ("connection/test_client_stream_vectors.py::test_client_produces_expected_outcome_of_stream_vector",),
    67: (
        "connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",
        "connection/test_client_stream_vectors.py::test_client_produces_expected_outcome_of_stream_vector",
    ),
    68: ("connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",),
    69: ("connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",),
    70: (
        "connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",
        "connection/test_client_stream_vectors.py::test_client_produces_expected_outcome_of_stream_vector",
    ),
    71: ("server/test_streams.py::test_unread_stream_does_not_slow_others",),
    72: ("server/test_stream_items.py::test_streams_that_depend_on_one_another_do_not_deadlock",),
    73: ("server/test_streams.py::test_client_that_reads_its_items_too_slowly_is_reset",),
    74: ("server/test_streams.py::test_item_that_waits_for_credit_too_long_cuts_the_stream",),
    75: ("server/test_streams.py::test_silent_client_with_a_stream_is_pinged_and_then_left",),
    76: (
        "connection/test_server_stream_vectors.py::test_server_produces_expected_outcome_of_stream_vector",
        "connection/test_client_stream_vectors.py::test_client_produces_expected_outcome_of_stream_vector",
    ),
    77: (
        "client/test_stream_scripts.py::test_many_items_of_one_read_wake_the_application_once_and_keep_their_order",
    ),
    78: ("client/test_stream_items.py::test_method_that_returns_early_closes_the_source",),
    79: (
        "client/test_streams.py::test_break_out_of_the_short_form_cancels_the_method",
        "client/test_streams.py::test_leaving_early_cancels_the_method",
    ),
    80: ("client/test_streams.py::test_second_task_that_iterates_fails",),
    81: (
        "client/test_handlers.py::test_error_of_the_handler_is_raised_in_the_method_and_aborts_it",
        "server/test_calls.py::test_client_that_has_registered_nothing_is_unavailable",
        "connection/test_server_call_states.py::test_method_that_is_not_registered_is_unavailable",
    ),
    82: (
        "connection/test_call_vectors.py::test_receiver_produces_expected_outcome_of_call_vector",
        "connection/test_server_call_states.py::test_answers_that_answer_nothing_are_counted_and_slow_the_peer_down",
    ),
    83: (
        "connection/test_call_vectors.py::test_receiver_produces_expected_outcome_of_call_vector",
        "connection/test_client_call_states.py::test_call_that_is_not_possible_is_refused",
    ),
    84: (
        "connection/test_server_call_states.py::test_state_and_input_give_next_state_and_action",
        "server/test_calls.py::test_deadline_fails_the_call_and_withdraws_it",
        "client/test_handlers.py::test_call_without_answer_ends_at_its_deadline",
    ),
    85: (
        "connection/test_call_vectors.py::test_receiver_produces_expected_outcome_of_call_vector",
        "connection/test_server_call_states.py::test_request_and_call_with_one_number_are_both_answered",
    ),
    86: (
        "client/test_handlers.py::test_calls_beyond_the_limit_are_refused_in_the_server",
        "connection/test_server_call_states.py::test_calls_beyond_the_limit_of_the_client_or_the_server_are_refused",
    ),
    87: (
        "client/test_handlers.py::test_lost_connection_fails_the_call_in_the_method",
        "server/test_calls.py::test_lost_connection_fails_its_calls_and_forgets_the_client",
    ),
    88: (
        "client/test_handlers.py::test_calls_by_user_reach_the_newest_registration_then_the_other",
        "server/test_calls.py::test_clients_are_found_by_user_and_method_the_newest_first",
    ),
    89: (
        "client/test_handlers.py::test_revoked_session_fails_its_calls_and_cancels_the_handlers",
        "client/test_registration.py::test_revoked_event_cancels_the_handlers",
        "server/test_calls.py::test_ended_session_fails_its_calls_only",
    ),
    90: (
        "client/test_handlers.py::test_result_of_the_largest_size_arrives_and_a_larger_one_fails",
        "connection/test_client_call_states.py::test_largest_result_is_sent",
    ),
    91: (
        "app/test_topics.py::test_one_turn_of_the_loop_wakes_few_of_10000_subscribers",
        "server/test_topics.py::test_connection_that_does_not_read_holds_up_no_other_subscriber",
        "server/test_topics.py::test_client_too_slow_for_the_topic_is_cancelled",
    ),
    92: ("app/test_topics.py::test_publish_from_another_thread_names_call_soon_threadsafe",),
    93: ("server/test_streams.py::test_connection_without_streams_takes_little_memory",),
    94: (
        "connection/test_frame_arrival.py::test_request_and_answer_of_1_mb_pass_a_link_of_20_kb_per_second_with_10_s_delay",
    ),
    95: (
        "client/test_user_sessions.py::test_users_of_one_connection_call_stream_and_are_called",
        "client/test_user_sessions.py::test_revoked_session_ends_alone",
    ),
}
"""Case number -> tests. A case without a test is not implemented, or not yet tested."""

WITHOUT_TEST = 0


@cache
def functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return frozenset(
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def test_all_cases_are_listed() -> None:
    assert [*CASES] == [*range(1, 96)]


@pytest.mark.parametrize("case", CASES)
def test_tests_of_case_exist(case: int) -> None:
    for name in CASES[case]:
        file, function = name.split("::")
        assert function in functions_of(file), name


def test_number_of_cases_without_a_test_does_not_grow() -> None:
    assert sum(not tests for tests in CASES.values()) == WITHOUT_TEST
