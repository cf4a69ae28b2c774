"""What people who do this job have run into, case by case, and the tests that show what the program does then.

Each case was met in the field by somebody, with this program or with another one. A case stays here for as long as the
program does: whoever renames a test renames it here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

SOURCE: Mapping[str, tuple[str, ...]] = {
    "rows in child tables, by inheritance or of a hypertable": ("test_inheritance",),
    "the table is swapped, renamed, moved or made UNLOGGED while it runs": (
        "test_partitions",
        "test_mended_while_it_runs",
        "test_mended_while_it_is_down",
    ),
    "content is swapped, rewritten, made again, partitioned, without its identity": ("test_content",),
    "synchronous_standby_names would choose the replicator": (
        "test_commits_do_not_wait_for_the_sinks_without_a_word",
        "test_commits_that_wait_for_us_do_not_wait_for_our_checkpoint",
    ),
    "a fast shutdown of PostgreSQL while a sink is down": ("test_a_fast_shutdown_does_not_wait_for_a_sink",),
    "the first start behind an open transaction": (
        "test_a_slot_that_waits_for_a_transaction",
        "test_a_slot_that_waits_for_a_prepared_transaction",
    ),
    "columns of a domain": ("test_integers_of_a_domain",),
    "rows that a policy hides, behind a pooler": ("test_rows_that_a_policy_hides_behind_a_pooler",),
    "ids are given a second time": ("test_a_truncate_is_told",),
    "a server that speaks French, a role whose encoding is LATIN1": (
        "test_who_speaks_is_seen_in_every_language",
        "test_the_end_of_the_stream_is_retried_whatever_encoding_its_reason_has",
        "test_what_the_role_is_set_to_does_not_matter",
    ),
    "a checkpoint in the source's cluster that never comes to rest": (
        "test_a_stretch_without_rows_is_saved_at_the_feedback_interval",
    ),
    "managed services whose catalog denies the right to replicate": (
        "test_on_amazon_rds_the_right_is_a_role",
        "test_a_service_s_administrator_who_can_not_give_replication",
    ),
    "a row that can't be decoded": ("test_what_can_not_be_decoded_is_told_the_second_time",),
    "the source's password is rotated in its file": ("test_secrets_are_rotated",),
    "timeouts that are set for the role": ("test_what_the_role_is_set_to_does_not_matter",),
    "a stream that breaks at the same place again and again": (
        "test_no_progress_is_told_from_the_third_time_on",
        "test_a_stream_that_comes_no_further_is_not_ready",
    ),
    "an upgrade that keeps the slot": ("test_init_makes_a_failover_slot_of_an_older_one",),
    "a planned switchover": (
        "test_a_switchover_is_followed",
        "test_a_promoted_standby_that_has_all_that_was_read_is_continuous",
    ),
    "a failover that lost commits": ("test_a_failover_that_lost_commits",),
    "several hosts, and a target that must be writable": (
        "test_several_hosts_of_which_one_is_dead",
        "test_nor_does_the_environment",
    ),
}

SINKS: Mapping[str, tuple[str, ...]] = {
    "a batch that is too large for a front end": ("test_too_large", "test_a_small_limit", "test_it_grows_again"),
    "a front end that drops the settings of inserts": (
        "test_are_read_back",
        "test_a_front_end_that_strips_settings_from_the_start",
    ),
    "a broken materialized view": ("test_a_broken_view", "test_a_broken_one_is_named"),
    "a line of Redis, or of its proxy, that nobody knows": ("test_a_line_that_nobody_knows_is_not_now",),
    "409 for a key that is still being worked on": ("test_overload_is_unavailable",),
    "odd answers that begin with 2xx": ("test_an_odd_2xx_is_a_2xx",),
    "http:// where the port speaks TLS": ("test_http_to_a_port_with_tls_is_nobody_s_fault",),
    "a checkpoint database behind a pooler": (
        "test_a_pooler_before_the_checkpoint",
        "test_through_a_pooler_life_after_life",
    ),
    "a name server that hangs": ("test_a_silent_name_server_holds_up_nobody_else",),
    "a rolling update waits for a standby to be ready": (
        "test_a_standby_is_well",
        "test_a_standby_has_a_light_of_its_own",
    ),
    "secrets are rotated": ("test_secrets_are_rotated", "test_a_secret_in_a_file_is_read_again"),
    "a proxy in the environment": ("test_no_proxy_of_the_environment",),
    "options in URLs": (
        "test_unusable_urls_are_named_without_their_password",
        "test_an_option_that_the_driver_does_not_take_is_a_setting_to_correct",
    ),
    "variables that Kubernetes sets": ("test_kubernetes_variables_are_no_settings",),
    "errors about settings as JSON": ("test_the_last_line_has_the_form_of_the_log", "test_a_json_line_has_fields"),
    "MySQL and its kin as the checkpoint database": ("test_mysql_takes_the_keys",),
    "two sources in one Redis": ("test_two_sources_do_not_share_keys", "test_two_sources_are_kept_apart"),
    "an idle connection that the API has closed": ("test_hangs_up", "test_hangs_up_again_and_again"),
    "process 1 of a container, and a destination that hangs": ("test_a_command_ends_while_a_sink_hangs",),
    "ClickHouse answers 200 and has not inserted": (
        "test_nothing_counts_that_is_not_there",
        "test_nothing_counts_without_a_proof",
    ),
    "ClickHouse after a power cut": ("test_durable",),
    "an API that refuses everything": (
        "test_it_refuses_everything_from_the_start",
        "test_it_breaks_at_three_in_the_morning",
        "test_it_refuses_half_of_all_requests_at_random",
    ),
}

FIRST_DAYS: Mapping[str, tuple[str, ...]] = {
    "a printed cure that breaks other people's replication": ("test_the_list_of_plugins_is_extended",),
    "a renamed column": ("test_mended_while_it_runs", "test_mapped"),
    "the checkpoint and the working directory": ("test_the_default_checkpoint_is_not_in_the_working_directory",),
    "the wheel": ("test_installed",),
    "a sink is paused, or left out and put back": ("test_a_pause_lasts_over_a_kill", "test_a_sink_is_taken_out"),
    "Ctrl-C, twice": ("test_a_second_signal_ends_it_at_once",),
    "check on a machine where everything is prepared": (
        "test_check_passes_before_init_and_while_it_runs",
        "test_what_init_makes",
    ),
    "names that collide once it is installed": ("test_installed", "test_backfill_has_two_doors"),
    "exit codes for scripts": ("test_exit_code",),
    "a wrong password is not an unreachable server": ("test_each_refusal_has_its_words",),
    "why an event was refused": ("test_refuses_events_and_says_why", "test_a_summary_counts_by_reason"),
    "check beside a running replicator that is not ready": ("test_check_asks_the_running_replicator",),
    "status at three in the morning": ("test_every_reason_has_a_line", "test_in_trouble"),
    "a log that says what runs": ("test_the_first_lines_say_what_runs", "test_version"),
    "mistakes in settings": ("test_unknown_names", "test_all_mistakes_at_once", "test_where_a_value_comes_from"),
    "help, and arguments with a mistake": ("test_help", "test_a_wrong_argument_is_one_line_and_exit_2"),
}

SECURITY: Mapping[str, tuple[str, ...]] = {
    "connections that say nothing, to the admin port": (
        "test_many_slow_connections_neither_end_nor_stall_it",
        "test_whoever_says_nothing_is_closed_and_holds_up_nobody",
        "test_no_descriptors_left_is_a_line_a_minute",
    ),
    "a redirect to another host": ("test_a_redirect_is_not_followed",),
    "an error of ClickHouse where no insert is": ("test_any_code_anywhere",),
    "an @ in the password of a URL": ("test_secrets_are_never_shown", "test_unusable_settings"),
    "answers without end": (
        "test_an_endless_answer",
        "test_a_bomb",
        "test_one_that_trickles",
        "test_an_answer_is_bounded",
        "test_a_2xx_counts_whatever_its_body_does",
    ),
    "files that others can read": ("test_files_are_ours_alone", "test_the_embedded_engine_s_files_are_ours_alone"),
    "rights that are wider than needed": ("test_the_rights_that_are_printed_are_enough_and_no_more", "test_rights"),
    "what a dead letter of a row keeps": ("test_a_wrong_type_is_refused",),
    "secrets in clear": ("test_a_sink_s_secret_in_clear", "test_a_server_that_need_not_prove_itself"),
    "another Host, another address": (
        "test_another_name_is_misdirected",
        "test_an_address_that_others_reach_is_named",
    ),
    "control characters of servers and rows": (
        "test_no_server_writes_a_line_of_its_own",
        "test_no_letter_writes_on_the_terminal",
        "test_what_servers_say_is_escaped",
    ),
    "one person's data is erased": ("test_one_person_is_erased_everywhere",),
}

CASES = {**SOURCE, **SINKS, **FIRST_DAYS, **SECURITY}


@pytest.fixture(scope="module")
def tests() -> set[str]:
    """The names of all tests."""
    sources = (file.read_text(encoding="utf-8") for file in TESTS.rglob("test_*.py"))
    return {name for source in sources for name in re.findall(r"def (test_\w+)", source)}


@pytest.mark.parametrize("case", CASES)
def test_it_has_a_test(case: str, tests: set[str]) -> None:
    """The tests that it names are there."""
    assert [] == [name for name in CASES[case] if name not in tests]
