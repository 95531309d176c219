"""Every bound in one place, with its reason."""

from datetime import timedelta

#: Due schedules claimed in one transaction: keeps a tick under the 250 ms budget.
DUE_BATCH = 400
#: Jobs sent in one tick: keeps a tick under the 250 ms budget.
DISPATCH_BATCH = 400
#: Accounts, and runs of each, read beyond what a tick needs: some will meet a busy resource.
DISPATCH_SPARE = 5
#: Candidates read per account and dispatch, so that one backlog cannot fill the picker's memory.
DISPATCH_PER_ACCOUNT = 50
#: Jobs in flight per free slot: a worker finds its next job at once, Redis holds little.
DISPATCH_WINDOW = 1.5
#: But at least so many: with few slots and short runs, the next tick would come too late.
DISPATCH_AHEAD = 8
#: A job not claimed by then is sent again under a new number (Redis lost it, or is slow).
DISPATCH_DEADLINE = timedelta(seconds=10)
#: How far back the reaper looks for waits that ended; the upkeep tick looks at everything.
WAKE_LOOKBACK = timedelta(seconds=10)
#: A run that waits so long goes before others of its account, again after each further such time.
PROMOTE_AFTER = timedelta(minutes=10)
PROMOTE_BATCH = 5_000
#: Expired leases taken in one reaper transaction.
REAP_BATCH = 100

#: Attempts without progress before a run fails; with progress a long stream deserves more.
ATTEMPTS_MAX = 5
ATTEMPTS_WITH_PROGRESS_MAX = 20
RETRY_FIRST = timedelta(seconds=10)
RETRY_FACTOR = 3
RETRY_LONGEST = timedelta(minutes=30)
#: Waits that another system asked for since the last progress; a longer one in all fails the run.
DEFERRED_MAX = timedelta(hours=24)
DEFERRAL_SHORTEST = timedelta(seconds=5)
#: Runs that one limit deferred come back over so long, or a tenth of their wait if that is more.
DEFERRAL_SPREAD = timedelta(seconds=10)
#: Lost leases since the last progress before the connection is paused: likely it kills workers.
LOST_LEASES_MAX = 3
#: Failed runs in a row before the connection is paused; `pause_after` of a connection decides.
FAILURES_IN_A_ROW_MAX = 10

#: A run that was told to stop, counted from then; with one heartbeat before it, all within 10 s:
#: server calls are cancelled so often, after so long the links are cut, after so long the run's
#: thread is given up.
CANCEL_EVERY_S = 1.0
CUT_AFTER_S = 4.0
GIVE_UP_AFTER_S = 6.0
#: Where nobody waits (drain, lost lease): a control database that is away makes threads wait, too.
GIVE_UP_UNASKED_S = 60.0

#: `resource test`, `resource discover` and `connection schema`: somebody is waiting at a prompt.
INTERACTIVE_DEADLINE = timedelta(seconds=30)
#: Purged rows can be brought back for so long.
PURGE_UNDO_FOR = timedelta(days=7)
#: A worker not heard of for so long is not counted on.
WORKER_SILENT_AFTER = timedelta(seconds=15)

#: A scheduler not heard of for so long is not counted on.
SCHEDULER_SILENT_AFTER = timedelta(seconds=15)

#: Slots a catch-up of `all` may queue at most.
CATCH_UP_MAX = 10
#: Slots of a cron that passed are counted so far; the ledger's `missed` then means "at least".
CATCH_UP_COUNTED = 1_000
#: `skip`: a slot older than this is not worth running any more.
CATCH_UP_WINDOW = timedelta(hours=24)

#: Log lines kept per attempt; the rest is counted, so that a loop cannot fill the disk.
LOG_LINES_MAX = 10_000
LOG_MESSAGE_MAX = 4_000
#: Lines of what another system said in its own words, per error.
RAW_LINES_MAX = 4
#: Characters of an error shown to people and stored with the run.
ERROR_TEXT_MAX = 1_000

#: Runs forgotten in one transaction of `retention`.
RETENTION_BATCH = 500
#: Seconds of it between other ticks of a scheduler, which must not wait; the rest comes soon after.
RETENTION_SLICE_S = 0.2
#: The ledger of slots proves that none was lost; nobody asks about older ones.
SLOTS_KEPT = timedelta(days=93)
