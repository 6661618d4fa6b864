// The plain build keeps no log.
#pragma once

static void log_access(const void*, unsigned, AccessKind, uintptr_t) {}
static void log_warp_sync(Fiber*) {}
static void note_expected(const void*) {}
static void forget_expected_reads() {}
static void copy_issued(const AsyncCopy&) {}
static void copy_landed(Fiber*, const AsyncCopy&) {}
static void settle(Fiber*) {}
static void begin_trace(uint64_t) {}
static void begin_launch() {}
static void begin_block() {}
static void end_block() {}
static void begin_barrier_interval() {}
static bool catch_up(unsigned) { return false; }
static void judge_warp(unsigned) {}
