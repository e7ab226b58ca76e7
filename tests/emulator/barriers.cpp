// Where threads meet: lanes of a warp, __syncthreads, named barriers, clusters, mbarriers.
#include <cstring>

#include "state.h"

namespace emulator {

// --- Warps and CTAs
// ---------------------------------------------------------------------------------------------------

static Meeting* meeting_of(Warp* warp, uint32_t mask) {
    for (auto& meeting : warp->meetings) {
        if (meeting->mask == mask) return meeting.get();
    }
    warp->meetings.push_back(std::make_unique<Meeting>());
    warp->meetings.back()->mask = mask;
    return warp->meetings.back().get();
}

// *.sync: all lanes of the mask must execute the same instruction, with the same mask, before one of them goes on.
void collective(uint32_t mask, uint64_t value, const char* op, uint64_t (&out)[32]) {
    const int own = lane();
    if ((mask >> own & 1) == 0) fail("%s with a mask %x that the lane is not in", op, mask);
    Meeting* meeting = meeting_of(&machine.cta->warps[machine.current->thread / 32], mask);
    const int generation = meeting->generation;
    if (meeting->came == 0) meeting->op = op;
    if (strcmp(meeting->op, op) != 0) fail("lanes of a warp are at %s and at %s", meeting->op, op);
    if (meeting->came >> own & 1) fail("%s: a lane comes twice", op);
    meeting->values[generation % 2][own] = value;
    meeting->came |= 1u << own;
    if (meeting->came == mask) {
        meeting->came = 0;
        ++meeting->generation;
    } else {
        wait_generation(&meeting->generation, generation);
    }
    memcpy(out, meeting->values[generation % 2], sizeof out);
}

void converge(const char* op) {
    uint64_t out[32];
    collective(~0u, 0, op, out);
}

bool complete_if_last(Counter* counter, int expected) {
    if (++counter->came < expected) return false;
    counter->came = 0;
    ++counter->generation;
    return true;
}

// bar.sync 0 of all threads that have not exited.
int sync_cta(int value) {
    Cta* cta = machine.cta;
    const int generation = cta->all.generation;
    cta->sums[generation % 2] += value;
    if (complete_if_last(&cta->all, cta->alive)) {
        cta->sums[(generation + 1) % 2] = 0;
    } else {
        wait_generation(&cta->all.generation, generation);
    }
    return cta->sums[generation % 2];
}

// bar.sync and bar.arrive are executed per warp; the number of threads is a multiple of the warp's.
void named_barrier(uint32_t id, uint32_t threads, bool waits) {
    if (id == 0 || id > 15 || threads % 32 != 0) fail("named barrier %u of %u threads", id, threads);
    converge(waits ? "bar.sync" : "bar.arrive");
    // Counted in threads: each lane adds one.
    Counter* barrier = &machine.cta->named[id];
    if (barrier->came != 0 && barrier->expected != static_cast<int>(threads))
        fail("named barrier %u: of %d threads and of %u", id, barrier->expected, threads);
    barrier->expected = static_cast<int>(threads);
    const int generation = barrier->generation;
    if (!complete_if_last(barrier, barrier->expected) && waits) wait_generation(&barrier->generation, generation);
}

// --- Clusters
// ---------------------------------------------------------------------------------------------------------

void settle_cluster() {
    if (machine.cluster_came == 0 || machine.cluster_came != machine.cluster_alive) return;
    machine.cluster_came = 0;
    ++machine.cluster_phase;
}

// barrier.cluster.arrive marks the arrival of all threads of the warp, which execute it together (.aligned). Between
// two arrivals of a thread there is a wait.
void cluster_arrive() {
    converge("barrier.cluster.arrive");
    Fiber* fiber = machine.current;
    if (machine.cluster_size == 1) fail("barrier.cluster in a launch without clusters");
    if (fiber->cluster_arrivals != fiber->cluster_waits) fail("barrier.cluster.arrive twice without a wait");
    if (fiber->cluster_arrivals != machine.cluster_phase) fail("barrier.cluster: the thread has missed a phase");
    ++fiber->cluster_arrivals;
    ++machine.cluster_came;
    settle_cluster();
}

// barrier.cluster.wait returns when all threads of the cluster that have not exited have arrived.
void cluster_wait() {
    converge("barrier.cluster.wait");
    Fiber* fiber = machine.current;
    if (fiber->cluster_arrivals != fiber->cluster_waits + 1) fail("barrier.cluster.wait without an arrival");
    ++fiber->cluster_waits;
    if (options.cluster_wait_joins_cta) {
        Counter* join = &machine.cta->cluster_join;
        const int generation = join->generation;
        if (!complete_if_last(join, machine.cta->alive)) wait_generation(&join->generation, generation);
    }
    if (machine.cluster_phase >= fiber->cluster_waits) return;
    fiber->wait = Fiber::Wait::kCluster;
    fiber->value = fiber->cluster_waits;
    to_scheduler();
}

// --- mbarriers
// --------------------------------------------------------------------------------------------------------

// What an mbarrier's bytes hold, so that writes over it are seen.
static uint64_t mark_of(const Mbarrier& barrier) { return 0x7ba221e7'00000000ull | barrier.offset; }

static Mbarrier* find_mbarrier(uint32_t address) {
    for (auto& barrier : cta_of(address)->mbarriers) {
        if (barrier->offset == (address & kOffsetMask)) return barrier.get();
    }
    return nullptr;
}

Mbarrier* live_mbarrier(uint32_t address, const char* what) {
    const Cta* cta = cta_of(address);
    if (!cta->has_started) fail("%s of an mbarrier of CTA %u, which has not started", what, cta->rank);
    if (cta->has_exited) fail("%s of an mbarrier of CTA %u, which has exited", what, cta->rank);
    Mbarrier* barrier = find_mbarrier(address);
    if (barrier == nullptr) fail("%s of an mbarrier at %x that is not initialised", what, address);
    uint64_t mark;
    memcpy(&mark, bytes_at(address), sizeof mark);
    if (mark != mark_of(*barrier)) fail("%s: the mbarrier at %x has been written over", what, address);
    return barrier;
}

// mbarrier.init: phase 0, `arrivals` pending in each phase, no bytes.
void mbarrier_init(uint32_t address, uint32_t arrivals) {
    if (address % 8 != 0) fail("an mbarrier at %x, which is not on 8 bytes", address);
    if (find_mbarrier(address) != nullptr) fail("mbarrier.init of %x twice", address);
    auto barrier = std::make_unique<Mbarrier>();
    barrier->offset = address & kOffsetMask;
    barrier->expected = barrier->pending = static_cast<int>(arrivals);
    const uint64_t mark = mark_of(*barrier);
    memcpy(bytes_at(address), &mark, sizeof mark);
    machine.cta->mbarriers.push_back(std::move(barrier));
}

// A phase completes when no arrivals are pending and the bytes that arrived are those that were expected.
void settle_mbarrier(Mbarrier* barrier) {
    if (barrier->pending != 0 || barrier->bytes != 0) return;
    ++barrier->completed;
    barrier->pending = barrier->expected;
}

// The range of a transaction count is 2^20 - 1.
static void arrive(Mbarrier* barrier, uint32_t bytes) {
    if (barrier->pending < 1)
        fail("mbarrier at %x: more arrivals than the %d of a phase", barrier->offset, barrier->expected);
    barrier->bytes += bytes;
    if (barrier->bytes >= 1 << 20) fail("mbarrier at %x: too many bytes are expected", barrier->offset);
    --barrier->pending;
    settle_mbarrier(barrier);
}

// mbarrier.arrive.expect_tx raises the bytes that the current phase expects, then arrives.
void mbarrier_arrive(uint32_t address, uint32_t transaction_bytes) {
    arrive(live_mbarrier(address, "an arrival"), transaction_bytes);
}

// mbarrier.arrive.shared::cluster takes effect at the other CTA some time later.
void mbarrier_arrive_remote(uint32_t address) {
    address = full_address(address);
    live_mbarrier(address, "a remote arrival");
    const int target = static_cast<int>(cta_of(address)->rank);
    add_operation({target, true, [address] { arrive(live_mbarrier(address, "a remote arrival"), 0); }});
}

// mbarrier.try_wait.parity tells of the phase of that parity: the current one, or the one just before it. Who is let go
// two phases late would find the wrong one, so that being lapped is an error. Threads may leave out phases; whoever
// comes late by two therefore waits for another one here, as it would there.
void mbarrier_wait(uint32_t address, uint32_t parity) {
    const Mbarrier* barrier = live_mbarrier(address, "a wait");
    const int phase = barrier->completed;
    if (static_cast<uint32_t>(phase % 2) != parity) return;
    machine.current->wait = Fiber::Wait::kMbarrier;
    machine.current->barrier = barrier;
    machine.current->value = phase;
    to_scheduler();
    if (barrier->completed > phase + 1)
        fail("mbarrier at %x: a waiter for phase %d was lapped, %d are complete", address, phase, barrier->completed);
}

}  // namespace emulator
