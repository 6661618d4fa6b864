// What a warp's request costs. Global memory moves in sectors of 32 bytes. Shared memory has 32 banks of 4 bytes; lanes
// that want different words of one bank wait for one another, and each round is a wavefront.
#pragma once

enum { SECTOR = 32, BANKS = 32 };

struct Traffic {                   // of one place in the kernel on one region; read by Python (report.py)
  uint32_t place;
  uint16_t region;
  uint8_t kind, size;
  uint64_t requests, lanes, bytes, sectors, ideal_sectors, wavefronts, ideal_wavefronts;
};

static Traffic* traffic;           // a hash table, twice as large when it is half full; free where there are no requests
static uint32_t n_traffic, traffic_slots;
static Traffic* last_traffic;

static bool belongs(const Traffic& t, const Access& a) {
  return t.place == a.place && t.region == a.region && t.kind == a.kind;
}

static Traffic* slot_for(const Access& a) {
  uint32_t h = a.place * 2654435761u + a.region * 40503u + a.kind;
  Traffic* t = &traffic[h & (traffic_slots - 1)];
  while (t->requests && !belongs(*t, a)) t = &traffic[++h & (traffic_slots - 1)];
  return t;
}

static COLD void grow_traffic() {
  Traffic* old = traffic;
  uint32_t old_slots = traffic_slots;
  traffic_slots = old_slots ? old_slots * 2 : 1024;
  traffic = (Traffic*)calloc(traffic_slots, sizeof *traffic);
  for (uint32_t i = 0; i < old_slots; ++i) {
    if (!old[i].requests) continue;
    Access a = {0, old[i].place, old[i].region, old[i].size, (AccessKind)old[i].kind};
    *slot_for(a) = old[i];
  }
  free(old);
}

static COLD Traffic* new_traffic(const Access& a) {
  if (n_traffic++ * 2 >= traffic_slots) grow_traffic();
  Traffic* t = slot_for(a);
  *t = {a.place, a.region, a.kind, a.size};
  return last_traffic = t;
}

static Traffic* traffic_of(const Access& a) {
  if (last_traffic && belongs(*last_traffic, a)) return last_traffic;
  if (!traffic_slots) return new_traffic(a);
  Traffic* t = slot_for(a);
  return last_traffic = t->requests ? t : new_traffic(a);
}

static unsigned wavefronts_of(const Access* const* access, unsigned n) {
  unsigned words = (access[0]->size + 3u) / 4;
  uint64_t first = access[0]->address / 4;
  bool broadcast = words == 1, consecutive = words == 1;                // by far the most common, and free of conflicts
  for (unsigned i = 0; i < n && (broadcast || consecutive); ++i) {
    uint64_t word = access[i]->address / 4;
    broadcast &= word == first;
    consecutive &= word == first + i;
  }
  if (broadcast || consecutive) return 1;

  uint64_t wanted[BANKS][WARP];
  uint8_t n_wanted[BANKS] = {0};
  unsigned most = 1;
  for (unsigned i = 0; i < n; ++i) {
    if (i && access[i]->address == access[i - 1]->address) continue;
    for (unsigned k = 0; k < words; ++k) {
      uint64_t word = access[i]->address / 4 + k;
      unsigned bank = (unsigned)(word % BANKS), j = 0;
      while (j < n_wanted[bank] && wanted[bank][j] != word) ++j;
      if (j < n_wanted[bank]) continue;
      wanted[bank][j] = word;
      n_wanted[bank]++;
      if (j + 1 > most) most = j + 1;
    }
  }
  return most;
}

static void count_shared(Traffic* t, const Access* const* access, unsigned n) {
  unsigned size = access[0]->size, together = size <= 4 ? 32 : size == 8 ? 16 : 8;    // wide ones go half or quarter warp at a time
  for (unsigned i = 0; i < n; i += together) {
    t->wavefronts += wavefronts_of(access + i, n - i < together ? n - i : together);
    t->ideal_wavefronts++;
  }
}

static void set_bit(uint8_t* bits, uint64_t i) { bits[i / 8] |= (uint8_t)(1u << (i % 8)); }

static void count_global(Traffic* t, const Access* const* access, unsigned n) {
  Region& r = region[t->region];
  uint64_t sector[2 * WARP], largest = 0, distinct_bytes = 0, previous = ~0ull;
  unsigned n_sectors = 0;
  for (unsigned i = 0; i < n; ++i) {
    uint64_t s = (access[i]->address - r.low) / SECTOR;                 // an aligned access lies within one sector
    if (access[i]->address != previous) distinct_bytes += access[0]->size;
    previous = access[i]->address;
    if (n_sectors && s <= largest) {
      unsigned j = n_sectors;
      while (j && sector[j - 1] != s) --j;
      if (j) continue;
    }
    sector[n_sectors++] = s;
    if (s > largest) largest = s;
  }
  uint64_t ideal = (distinct_bytes + SECTOR - 1) / SECTOR;
  t->sectors += n_sectors;
  t->ideal_sectors += ideal < n_sectors ? ideal : n_sectors;
  for (unsigned j = 0; j < n_sectors; ++j) {
    if (t->kind != STORE) set_bit(r.loaded, sector[j]);
    if (t->kind != LOAD) set_bit(r.stored, sector[j]);
  }
}

static void count_request(const Access* const* access, unsigned n) {
  Traffic* t = traffic_of(*access[0]);
  t->requests++;
  t->lanes += n;
  t->bytes += (uint64_t)n * access[0]->size;      // a struct is copied in pieces of several sizes
  if (is_shared(t->region)) count_shared(t, access, n);
  else count_global(t, access, n);
}

static void reset_traffic() {
  if (n_traffic) memset(traffic, 0, traffic_slots * sizeof *traffic);
  n_traffic = 0;
  last_traffic = 0;
}

// Moves the used entries to the front, where Python reads them.
EXPORT const Traffic* cu_traffic(int* n) {
  *n = 0;
  for (uint32_t i = 0; i < traffic_slots; ++i)
    if (traffic[i].requests) traffic[(*n)++] = traffic[i];
  return traffic;
}
