// From 32 logs of lanes to the requests of a warp: accesses at the same place of the kernel belong together.
#pragma once

// The kind too: one cp.async logs a load, a store and, later, a landing.
static inline uint32_t key_of(const Access& a) { return a.place | (uint32_t)a.kind << 28; }

// One warp instruction, `n` lanes active, counted and judged. Almost always on one region; if not, one region after the
// other. Changes `access` and `lane`.
enum { COUNT = 1, JUDGE = 2 };
static void request(const Access** access, unsigned* lane, unsigned n, unsigned warp, int what) {
  if (access[0]->kind == WARP_SYNC) { warp_epoch[warp]++; return; }
  while (n) {
    const Access *one[WARP], *rest[WARP];
    unsigned one_lane[WARP], rest_lane[WARP], n_one = 0, n_rest = 0;
    bool mixed = false;
    for (unsigned i = 1; i < n; ++i) mixed |= access[i]->region != access[0]->region;
    if (!mixed) {
      if (what & COUNT && access[0]->kind != LANDED && access[0]->region != MODULE) {
        count_request(access, n);
        note_workers(*access[0], lane, n, warp);
      }
      if (what & JUDGE) judge_request(access, lane, n, warp);
      return;
    }
    for (unsigned i = 0; i < n; ++i) {
      bool first = access[i]->region == access[0]->region;
      (first ? one[n_one] : rest[n_rest]) = access[i];
      (first ? one_lane[n_one++] : rest_lane[n_rest++]) = lane[i];
    }
    request(one, one_lane, n_one, warp, what);
    memcpy(access, rest, n_rest * sizeof *rest);
    memcpy(lane, rest_lane, n_rest * sizeof *rest_lane);
    n = n_rest;
  }
}

// The lanes went different ways. Up to the next __syncwarp, the k-th execution of a place by one lane belongs to the
// k-th execution of that place by the others: they form a group, which is one request. Groups are judged so that every
// lane's accesses come in the order in which it made them. Where that is not possible (one lane was at A before B, another
// at B before A) a group is counted as one request and judged in parts.
struct Group { uint32_t key, k, lanes, arrived, index[WARP]; bool counted; };

struct Grouping {
  Group* group;
  uint32_t n_groups;
  uint32_t* of[WARP];              // for each lane, the groups of its accesses, in its own order
};

// The hash tables are as large as what they hold needs.
static Grouping group_accesses(const Fiber* f, unsigned n_lanes, const uint32_t* position, const uint32_t* stop,
                               uint32_t total) {
  struct Count { uint32_t key, k, lane; };
  uint32_t n_slots = 64;
  while (n_slots < total * 2) n_slots *= 2;
  Grouping g = {(Group*)malloc(sizeof(Group) * total), 0, {0}};
  Count* count = (Count*)calloc(n_slots, sizeof *count);                // hash of a key -> how often the lane was there
  uint32_t* slot = (uint32_t*)calloc(n_slots, sizeof *slot);            // hash of (key, k) -> group + 1
  uint32_t* of = (uint32_t*)malloc(sizeof *of * total);
  for (unsigned l = 0; l < n_lanes; ++l) {
    g.of[l] = of;
    for (uint32_t i = position[l]; i < stop[l]; ++i) {
      uint32_t key = key_of(f[l].log[i]), c = (key * 2654435761u >> 12) & (n_slots - 1);
      while (count[c].lane == l + 1 && count[c].key != key) c = (c + 1) & (n_slots - 1);
      if (count[c].lane != l + 1) count[c] = {key, 0, l + 1};           // an entry of another lane is free
      uint32_t k = count[c].k++, h = key * 2654435761u ^ k * 0x9E3779B1u;
      h = (h ^ h >> 15) & (n_slots - 1);
      while (slot[h] && (g.group[slot[h] - 1].key != key || g.group[slot[h] - 1].k != k)) h = (h + 1) & (n_slots - 1);
      if (!slot[h]) {
        Group& made = g.group[g.n_groups];
        made.key = key;
        made.k = k;
        made.lanes = made.arrived = 0;
        made.counted = false;
        slot[h] = ++g.n_groups;
      }
      Group& mine = g.group[slot[h] - 1];
      mine.lanes |= 1u << l;
      mine.index[l] = i;
      *of++ = slot[h] - 1;
    }
  }
  free(count);
  free(slot);
  return g;
}

static void request_of(const Group& g, uint32_t lanes, unsigned warp, int what) {
  const Access* access[WARP];
  unsigned lane[WARP], n = 0;
  for (unsigned l = 0; l < (unsigned)WARP; ++l)
    if (lanes >> l & 1) { access[n] = &B.fiber[warp * WARP + l].log[g.index[l]]; lane[n++] = l; }
  request(access, lane, n, warp, what);
}

static void pair_diverged(unsigned warp, uint32_t* position) {
  Fiber* f = B.fiber + warp * WARP;
  unsigned n_lanes = lanes_of(warp);
  uint32_t stop[WARP], total = 0;
  for (unsigned l = 0; l < n_lanes; ++l) {
    stop[l] = position[l];
    while (stop[l] < f[l].n_log && f[l].log[stop[l]].kind != WARP_SYNC) stop[l]++;
    total += stop[l] - position[l];
  }
  if (!total) {                    // every lane stands at its __syncwarp (or is at its end)
    for (unsigned l = 0; l < n_lanes; ++l) position[l] += position[l] < f[l].n_log;
    warp_epoch[warp]++;
    return;
  }
  Grouping g = group_accesses(f, n_lanes, position, stop, total);
  for (uint32_t at[WARP] = {0}, left = total; left;) {
    uint32_t complete = ~0u, earliest = ~0u;
    for (unsigned l = 0; l < n_lanes; ++l) {
      if (at[l] == stop[l] - position[l]) continue;
      uint32_t j = g.of[l][at[l]];
      g.group[j].arrived |= 1u << l;
      if (j < complete && g.group[j].arrived == g.group[j].lanes) complete = j;
      if (j < earliest) earliest = j;
    }
    Group& group = g.group[complete != ~0u ? complete : earliest];
    if (!group.counted) request_of(group, group.lanes, warp, COUNT);
    group.counted = true;
    request_of(group, group.arrived, warp, JUDGE);
    for (unsigned l = 0; l < n_lanes; ++l)
      if (group.arrived >> l & 1) { at[l]++; left--; }
    group.lanes &= ~group.arrived;
    group.arrived = 0;
  }
  memcpy(position, stop, n_lanes * sizeof *stop);
  free(g.of[0]);
  free(g.group);
}

// Judge what the logs of a warp hold. With lanes still running (`partial`), only as far as all have come the same way.
static void judge_logs(unsigned warp, bool partial) {
  Fiber* f = B.fiber + warp * WARP;
  unsigned n_lanes = lanes_of(warp);
  const Access* log[WARP];         // copies: this is where a checked run spends its time
  uint32_t n_log[WARP], position[WARP] = {0};
  for (unsigned l = 0; l < n_lanes; ++l) { log[l] = f[l].log; n_log[l] = f[l].n_log; }
  for (;;) {
    const Access* access[WARP];
    unsigned lane[WARP], n = 0;
    bool same = true, mixed = false, must_wait = false;
    for (unsigned l = 0; l < n_lanes; ++l) {
      if (position[l] < n_log[l]) {
        access[n] = log[l] + position[l];
        same &= key_of(*access[n]) == key_of(*access[0]);
        mixed |= access[n]->region != access[0]->region;
        lane[n++] = l;
      } else if (partial && f[l].state == LOG_FULL) {
        must_wait = true;
        break;
      } else if (n_log[l]) {
        same = false;
      }
    }
    if (!n || must_wait || (partial && !same)) break;
    if (!same) { pair_diverged(warp, position); continue; }
    for (unsigned k = 0; k < n; ++k) position[lane[k]]++;
    if (mixed || access[0]->kind >= ATOMIC || access[0]->region == MODULE) {
      request(access, lane, n, warp, COUNT | JUDGE);
    } else {
      count_request(access, n);
      note_workers(*access[0], lane, n, warp);
      judge_request(access, lane, n, warp);
    }
  }
  for (unsigned l = 0; l < n_lanes; ++l) {
    uint32_t left = f[l].n_log - position[l];
    if (left) memmove(f[l].log, f[l].log + position[l], left * sizeof(Access));
    f[l].n_log = left;
  }
}

static void judge_warp(unsigned warp) { judge_logs(warp, false); }

// Some lanes stopped because their logs are full: judge, and let them go on. Logs of lanes that never meet again (an
// endless loop in one lane, say) must not grow without end, so from some length on they are judged as they are.
static bool catch_up(unsigned warp) {
  Fiber* f = B.fiber + warp * WARP;
  unsigned n_lanes = lanes_of(warp);
  bool any = false, too_long = false;
  for (unsigned l = 0; l < n_lanes; ++l) any |= f[l].state == LOG_FULL;
  if (!any) return false;
  judge_logs(warp, true);
  for (unsigned l = 0; l < n_lanes; ++l) too_long |= f[l].n_log >= LONGEST_LOG;
  if (too_long) judge_logs(warp, false);
  for (unsigned l = 0; l < n_lanes; ++l)
    if (f[l].state == LOG_FULL) f[l].state = READY;
  return true;
}
