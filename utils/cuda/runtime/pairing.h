// From 32 logs of lanes to the requests of a warp: accesses at the same place of the kernel belong together.
#pragma once

// The kind too: one cp.async logs a load, a store and, later, a landing.
static inline uint32_t key_of(const Access& a) { return a.place | (uint32_t)a.kind << 28; }

// One warp instruction, `n` lanes active. Almost always on one region; if not, one region after the other.
static void request(const Access** access, unsigned* lane, unsigned n, unsigned warp) {
  if (access[0]->kind == WARP_SYNC) { warp_epoch[warp]++; return; }
  while (n) {
    const Access *one[WARP], *rest[WARP];
    unsigned one_lane[WARP], rest_lane[WARP], n_one = 0, n_rest = 0;
    bool mixed = false;
    for (unsigned i = 1; i < n; ++i) mixed |= access[i]->region != access[0]->region;
    if (!mixed) {
      if (access[0]->kind != LANDED) count_request(access, n);
      judge_request(access, lane, n, warp);
      return;
    }
    for (unsigned i = 0; i < n; ++i) {
      bool first = access[i]->region == access[0]->region;
      (first ? one[n_one] : rest[n_rest]) = access[i];
      (first ? one_lane[n_one++] : rest_lane[n_rest++]) = lane[i];
    }
    request(one, one_lane, n_one, warp);
    memcpy(access, rest, n_rest * sizeof *rest);
    memcpy(lane, rest_lane, n_rest * sizeof *rest_lane);
    n = n_rest;
  }
}

// The lanes went different ways. Up to the next __syncwarp, the k-th execution of a place by one lane belongs to the
// k-th execution of that place by the others.
static void pair_diverged(unsigned warp, uint32_t* position) {
  struct Group { uint32_t key, k, lanes, index[WARP]; };
  struct Count { uint32_t key, k; };
  enum { COUNTS = 4096 };
  static Count count[COUNTS];
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
  uint32_t n_slots = 64, n_groups = 0;
  while (n_slots < total * 2) n_slots *= 2;
  Group* group = (Group*)malloc(sizeof(Group) * total);
  uint32_t* slot = (uint32_t*)calloc(n_slots, sizeof *slot);            // hash of (key, k) -> group + 1
  for (unsigned l = 0; l < n_lanes; ++l) {
    memset(count, 0xff, sizeof count);
    for (uint32_t i = position[l]; i < stop[l]; ++i) {
      uint32_t key = key_of(f[l].log[i]), c = (key * 2654435761u >> 20) % COUNTS;
      while (count[c].key != ~0u && count[c].key != key) c = (c + 1) % COUNTS;
      if (count[c].key == ~0u) count[c] = {key, 0};
      uint32_t k = count[c].k++, h = key * 2654435761u ^ k * 0x9E3779B1u;
      h = (h ^ h >> 15) & (n_slots - 1);
      while (slot[h] && (group[slot[h] - 1].key != key || group[slot[h] - 1].k != k)) h = (h + 1) & (n_slots - 1);
      if (!slot[h]) {
        group[n_groups].key = key;
        group[n_groups].k = k;
        group[n_groups].lanes = 0;
        slot[h] = ++n_groups;
      }
      Group& g = group[slot[h] - 1];
      g.lanes |= 1u << l;
      g.index[l] = i;
    }
  }
  for (uint32_t j = 0; j < n_groups; ++j) {
    const Access* access[WARP];
    unsigned lane[WARP], n = 0;
    for (unsigned l = 0; l < n_lanes; ++l)
      if (group[j].lanes >> l & 1) { access[n] = &f[l].log[group[j].index[l]]; lane[n++] = l; }
    request(access, lane, n, warp);
  }
  memcpy(position, stop, n_lanes * sizeof *stop);
  free(group);
  free(slot);
}

// Judge what the logs of a warp hold. With lanes still running (`partial`), only as far as all have come the same way.
static void judge_logs(unsigned warp, bool partial) {
  Fiber* f = B.fiber + warp * WARP;
  unsigned n_lanes = lanes_of(warp);
  uint32_t position[WARP] = {0};
  for (;;) {
    const Access* access[WARP];
    unsigned lane[WARP], n = 0;
    bool same = true, must_wait = false;
    for (unsigned l = 0; l < n_lanes; ++l) {
      if (position[l] < f[l].n_log) {
        access[n] = &f[l].log[position[l]];
        same &= key_of(*access[n]) == key_of(*access[0]);
        lane[n++] = l;
      } else if (f[l].state == LOG_FULL && partial) {
        must_wait = true;
        break;
      } else if (f[l].n_log) {
        same = false;
      }
    }
    if (!n || must_wait || (partial && !same)) break;
    if (!same) { pair_diverged(warp, position); continue; }
    request(access, lane, n, warp);
    for (unsigned l = 0; l < n_lanes; ++l) position[l] += position[l] < f[l].n_log;
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
