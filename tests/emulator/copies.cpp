// Shared memory, and copies into it that take effect some time after they were issued.
#include <algorithm>
#include <cstring>

#include "state.h"

namespace emulator {

// --- Addresses
// --------------------------------------------------------------------------------------------------------

void* dynamic_shared() { return machine.cta->arena; }

// As long as no thread has come to a variable, nothing lies at its place.
void* static_shared(const char* name, int line, size_t bytes) {
    for (const StaticVariable& variable : machine.statics) {
        if (variable.line == line && strcmp(variable.name, name) == 0) return machine.cta->arena + variable.offset;
    }
    const uint32_t offset = (machine.shared_end + 15) / 16 * 16;
    if (offset + bytes > kMostShared) fail("more than 227 KB of shared memory with %s", name);
    machine.statics.push_back({name, line, offset});
    machine.shared_end = offset + static_cast<uint32_t>(bytes);
    for (int rank = 0; rank < machine.cluster_size; ++rank) memset(machine.pool[rank]->arena + offset, 0xff, bytes);
    return machine.cta->arena + offset;
}

uint32_t address_of(const void* pointer) {
    const int64_t offset = static_cast<const char*>(pointer) - machine.cta->arena;
    if (offset < 0 || offset >= machine.shared_end) fail("an address that is not of shared memory");
    return static_cast<uint32_t>(offset);
}

// mapa.
uint32_t cluster_address(uint32_t address, uint32_t rank) {
    if (rank >= static_cast<uint32_t>(machine.cluster_size))
        fail("mapa: CTA %u of a cluster of %d", rank, machine.cluster_size);
    return (address & kOffsetMask) | (rank + 1) << kCtaShift;
}

Cta* cta_of(uint32_t address) {
    const uint32_t rank = address >> kCtaShift;
    return rank == 0 ? machine.cta : machine.pool[rank - 1].get();
}

uint32_t full_address(uint32_t address) { return (address & kOffsetMask) | (cta_of(address)->rank + 1) << kCtaShift; }

char* bytes_at(uint32_t address) { return cta_of(address)->arena + (address & kOffsetMask); }

// --- Bytes in flight
// --------------------------------------------------------------------------------------------------

bool is_in_flight(const Cta& cta, uint32_t offset, uint32_t bytes) {
    const auto begin = cta.in_flight.begin() + offset / kGranule;
    const auto end = cta.in_flight.begin() + (offset + bytes - 1) / kGranule + 1;
    return std::find(begin, end, 1) != end;
}

static void mark_in_flight(uint32_t address, uint32_t bytes, bool in_flight) {
    const uint32_t offset = address & kOffsetMask;
    for (uint32_t i = offset / kGranule; i <= (offset + bytes - 1) / kGranule; ++i)
        cta_of(address)->in_flight[i] = in_flight;
}

char* settled(uint32_t address, int bytes, const char* what) {
    const uint32_t offset = address & kOffsetMask;
    if (offset % static_cast<uint32_t>(bytes) != 0) fail("%s at %x is not aligned", what, address);
    if (is_in_flight(*cta_of(address), offset, static_cast<uint32_t>(bytes)))
        fail("%s at %x: an asynchronous copy to these bytes is in flight", what, address);
    return bytes_at(address);
}

// What lies there is lost from now on: who still reads it gets NaN.
static void take_off(uint32_t to, uint32_t bytes, const char* what) {
    const uint32_t offset = to & kOffsetMask;
    if (offset + bytes > machine.shared_end) fail("%s to %x goes past the end of shared memory", what, to);
    if (is_in_flight(*cta_of(to), offset, bytes)) fail("%s to %x, where another one is in flight", what, to);
    mark_in_flight(to, bytes, true);
    memset(bytes_at(to), 0xff, bytes);
}

static void check_target(uint32_t address, const char* what) {
    const Cta* cta = cta_of(address);
    if (!cta->has_started) fail("%s to CTA %u, which has not started", what, cta->rank);
    if (cta->has_exited) fail("%s to CTA %u, which has exited", what, cta->rank);
}

// --- Operations of the copy engine
// ------------------------------------------------------------------------------------

void add_operation(Operation operation) {
    const Landing landing = machine.landing;
    const bool now = landing == Landing::kAtOnce || (landing == Landing::kCopiesFirst && !operation.is_arrival) ||
                     (landing == Landing::kArrivalsFirst && operation.is_arrival) ||
                     (landing == Landing::kOneCtaLate && operation.target != machine.late_cta) ||
                     (landing == Landing::kRandom && one_in(8));
    if (now) {
        operation.run();
    } else {
        machine.operations.push_back(std::move(operation));
    }
}

bool run_one_operation() {
    std::vector<Operation>& all = machine.operations;
    if (all.empty()) return false;
    size_t i = one_in(4) ? 0 : random_bits() % all.size();
    if (machine.landing == Landing::kLastFirst) i = all.size() - 1;
    const Operation operation = std::move(all[i]);
    all.erase(all.begin() + static_cast<int64_t>(i));
    operation.run();
    return true;
}

// ...mbarrier::complete_tx::bytes: the bytes are there, then they are counted on the current phase of the barrier.
// Which must be the one in which they were asked for, or a waiter has been let go too early.
void copy_async(uint32_t to, uint32_t bytes, uint32_t barrier_address, std::function<void(char*)> write) {
    if (cta_of(to) != cta_of(barrier_address)) fail("bytes and their mbarrier are in different CTAs");
    to = full_address(to);
    const uint32_t at_barrier = full_address(barrier_address);
    check_target(to, "a copy");
    const int phase = live_mbarrier(at_barrier, "a copy")->completed;
    take_off(to, bytes, "a copy");
    const auto land = [=] {
        check_target(to, "bytes of a copy come");
        Mbarrier* barrier = live_mbarrier(at_barrier, "the bytes of a copy");
        write(bytes_at(to));
        mark_in_flight(to, bytes, false);
        if (barrier->completed != phase)
            fail("mbarrier at %x: bytes asked for in phase %d come in phase %d", at_barrier, phase, barrier->completed);
        barrier->bytes -= bytes;
        settle_mbarrier(barrier);
    };
    add_operation({static_cast<int>(cta_of(to)->rank), false, land});
}

// cp.async.bulk.shared::cluster.shared::cta reads its source some time between issue and completion.
void copy_shared_async(uint32_t to, uint32_t from, uint32_t bytes, uint32_t barrier) {
    if (to % 16 != 0 || from % 16 != 0 || bytes % 16 != 0) fail("cp.async.bulk is not on 16 bytes");
    const uint32_t source = full_address(from);
    const auto read = [source, bytes](char* destination) {
        const Cta* cta = cta_of(source);
        if (cta->has_exited) fail("the source of a bulk copy is in CTA %u, which has exited", cta->rank);
        if (is_in_flight(*cta, source & kOffsetMask, bytes)) fail("the source of a bulk copy is being written");
        memcpy(destination, bytes_at(source), bytes);
    };
    std::vector<char> now(bytes);
    read(now.data());
    if (one_in(2)) {
        copy_async(to, bytes, barrier, [now](char* destination) { memcpy(destination, now.data(), now.size()); });
    } else {
        copy_async(to, bytes, barrier, read);
    }
}

// --- cp.async
// ---------------------------------------------------------------------------------------------------------

static void do_copy(ThreadCopy* copy) {
    if (copy->is_done) return;
    copy->is_done = true;
    char* to = bytes_at(copy->to);
    memset(to, 0, 16);
    memcpy(to, copy->from, copy->bytes);
}

// cp.async.cg of 16 bytes: reads `bytes` of them and fills the rest with zeros, some time before its group is waited
// for.
void cp_async(uint32_t to, const void* from, uint32_t bytes) {
    if (to % 16 != 0 || (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0)) fail("cp.async is not on 16 bytes");
    take_off(to, 16, "cp.async");
    ThreadCopy copy = {full_address(to), from, bytes, machine.current->copy_group, false};
    if (one_in(2)) do_copy(&copy);
    machine.current->copies.push_back(copy);
}

void cp_async_commit() { ++machine.current->copy_group; }

// cp.async.wait_group: all but the last groups of this thread are complete. What is in no group is not waited for.
void cp_async_wait(int pending) {
    std::vector<ThreadCopy>& copies = machine.current->copies;
    const int end = machine.current->copy_group - pending;
    const auto is_complete = [end](const ThreadCopy& copy) { return copy.group < end; };
    for (ThreadCopy& copy : copies) {
        if (!is_complete(copy)) continue;
        do_copy(&copy);
        mark_in_flight(copy.to, 16, false);
    }
    copies.erase(std::remove_if(copies.begin(), copies.end(), is_complete), copies.end());
}

}  // namespace emulator
