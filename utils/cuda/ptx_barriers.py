"""PTX's barriers in shared memory (mbarrier) and the bulk copies that they wait for, of one dimension.

`meaning(name, given, rest)` is the C++ of one instruction, or None if it is not known; what it calls is in runtime/mbarrier.h.
"""

import re

SHARED = r"(?:\.shared(?:::cta|::cluster)?)?"
ORDER = r"(?:\.(?:release|relaxed|acquire))?(?:\.(?:cta|cluster))?"
NOTHING = re.compile(r"fence\.mbarrier_init\.release\.cluster|mbarrier\.inval\b.*|setmaxnreg\..*")
ARRIVE = re.compile(rf"mbarrier\.arrive(_drop)?(\.expect_tx|\.noComplete)?{ORDER}{SHARED}\.b64")
COUNT_BYTES = re.compile(rf"mbarrier\.(expect|complete)_tx{ORDER}{SHARED}\.b64")
WAIT = re.compile(rf"mbarrier\.(?:test|try)_wait(\.parity)?{ORDER}{SHARED}\.b64")
BULK_LOAD = re.compile(r"cp\.async\.bulk\.shared::(?:cluster|cta)\.global\.mbarrier::complete_tx::bytes")
BULK_STORE = re.compile(r"cp\.async\.bulk\.global\.shared::cta\.bulk_group")
TRACK = re.compile(rf"cp\.async\.mbarrier\.arrive(\.noinc)?{SHARED}\.b64")


def meaning(name, given, rest):
    if NOTHING.fullmatch(name):
        return "(void)0"
    if re.fullmatch(rf"mbarrier\.init{SHARED}\.b64", name) and len(given) == 2:
        return f"cu_mbarrier_init({_at(given[0])}, (int)({given[1]}), __LINE__)"
    if match := ARRIVE.fullmatch(name):
        return _arrive(match, given)
    if (match := COUNT_BYTES.fullmatch(name)) and len(given) == 2:
        sign = "" if match.group(1) == "expect" else "-"
        return f"(void)cu_mbarrier_arrive({_at(given[0])}, 0, {sign}(long long)({given[1]}), 0, __LINE__)"
    if (match := WAIT.fullmatch(name)) and len(given) in (3, 4):
        by_parity = int(bool(match.group(1)))
        return f"{given[0]} = (cu_mbarrier_wait({_at(given[1])}, {given[2]}, {by_parity}, __LINE__), true)"
    if BULK_LOAD.fullmatch(name) and len(given) == 4:
        return (
            f"cu_mbarrier_copy({_at(given[0])}, cu_ptx_pointer({given[1]}), {given[2]}, {_at(given[3])}, 1, __LINE__)"
        )
    if BULK_STORE.fullmatch(name) and len(given) == 3:
        return f"cu_bulk_store(cu_ptx_pointer({given[0]}), {_at(given[1])}, {given[2]})"
    if name == "cp.async.bulk.commit_group":
        return "__pipeline_commit()"
    if re.fullmatch(r"cp\.async\.bulk\.wait_group(?:\.read)?", name) and len(given) == 1:
        return f"__pipeline_wait_prior({given[0]})"
    if (match := TRACK.fullmatch(name)) and len(given) == 1:
        return f"cu_mbarrier_track({_at(given[0])}, {int(bool(match.group(1)))}, __LINE__)"
    if name == "elect.sync" and len(given) == 3 and "|" in rest:
        return f"{given[1]} = cu_lane() == (unsigned)__ffs((int)({given[2]})) - 1"
    return None


def _at(operand):
    return f"cu_shared_pointer((unsigned)({operand}))"


def _arrive(match, given):
    drops, kind = match.groups()
    if len(given) not in (2, 3) or (kind == ".expect_tx") != (len(given) == 3 and kind == ".expect_tx"):
        return None
    n, tx = ("1", given[2]) if kind == ".expect_tx" else (given[2] if len(given) == 3 else "1", "0")
    call = f"cu_mbarrier_arrive({_at(given[1])}, (int)({n}), (long long)({tx}), {n if drops else 0}, __LINE__)"
    return f"(void){call}" if given[0] == "_" else f"{given[0]} = {call}"
