// wgmma: products that are made some time between their issue and the wait for their group.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "state.h"

namespace emulator {

namespace {

constexpr int kDepth = 16;  // of a product
constexpr int kMostColumns = 256;

float half_value(uint16_t x) {
    const int exponent = x >> 10 & 31;
    const int mantissa = x & 1023;
    float size = std::ldexp(static_cast<float>(mantissa + (exponent > 0 ? 1024 : 0)), std::max(exponent, 1) - 25);
    if (exponent == 31) size = mantissa == 0 ? INFINITY : NAN;
    return x >> 15 ? -size : size;
}

float value_of(Element element, uint16_t x) {
    static const std::vector<float> halves = [] {
        std::vector<float> table(1 << 16);
        for (uint32_t i = 0; i < table.size(); ++i) table[i] = half_value(static_cast<uint16_t>(i));
        return table;
    }();
    if (element == Element::kHalf) return halves[x];
    const uint32_t bits = uint32_t{x} << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Fields of a matrix descriptor, in bytes (PTX ISA, "Matrix descriptor").
struct Tile {
    uint32_t start, leading, stride;

    explicit Tile(uint64_t descriptor)
        : start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
          leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
          stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4) {
        if (descriptor >> 62 != 1) fail("wgmma: a descriptor without the 128-byte swizzle");
    }
    // Element k of row `row` where rows follow one another and k is consecutive.
    uint32_t k_major(int row, int k) const { return start + row / 8 * stride + row % 8 * 128 + k * 2; }
    // Element `column` of row k where columns are consecutive, in groups of 64.
    uint32_t mn_major(int column, int k) const {
        return start + k / 8 * stride + k % 8 * 128 + column % 64 * 2 + column / 64 * leading;
    }
};

struct Operands {
    float a[16][kDepth];
    float b[kDepth][kMostColumns];
};

// Eight elements, 16 bytes of a tile. In the swizzle bits 4 to 6 of an address are xor'ed with bits 7 to 9.
void load_eight(const Cta& cta, Element element, uint32_t address, float* to, int step) {
    address ^= (address >> 7 & 7) << 4;
    if (is_in_flight(cta, address, 16)) fail("wgmma reads %x, where an asynchronous copy is in flight", address);
    uint16_t elements[8];
    memcpy(elements, cta.arena + address, sizeof elements);
    for (int i = 0; i < 8; ++i) to[i * step] = value_of(element, elements[i]);
}

// Lane l holds A's elements (row l / 4, columns 2 (l % 4) + 0, 1), (row + 8, same), (row, columns + 8), (row + 8, + 8).
void load_registers(const Product& product, Operands* operands) {
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const uint32_t word = product.a_registers[lane][i];
            float* to = &operands->a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8];
            to[0] = value_of(product.element, static_cast<uint16_t>(word));
            to[1] = value_of(product.element, static_cast<uint16_t>(word >> 16));
        }
    }
}

void load_operands(const Cta& cta, int warp, const Product& product, Operands* operands) {
    const Tile b(product.b);
    if (product.a_in_registers) {
        load_registers(product, operands);
        for (int k = 0; k < kDepth; ++k) {
            for (int n = 0; n < product.columns; n += 8)
                load_eight(cta, product.element, b.mn_major(n, k), &operands->b[k][n], 1);
        }
        return;
    }
    const Tile a(product.a);
    for (int k = 0; k < kDepth; k += 8) {
        for (int row = 0; row < 16; ++row)
            load_eight(cta, product.element, a.k_major(warp % 4 * 16 + row, k), &operands->a[row][k], 1);
        for (int n = 0; n < product.columns; ++n)
            load_eight(cta, product.element, b.k_major(n, k), &operands->b[k][n], kMostColumns);
    }
}

__attribute__((target_clones("avx2", "default"))) void multiply(const Operands& operands, int columns,
                                                                float (*product)[kMostColumns]) {
    for (int row = 0; row < 16; ++row) {
        for (int n = 0; n < columns; ++n) product[row][n] = operands.a[row][0] * operands.b[0][n];
        for (int k = 1; k < kDepth; ++k) {
            for (int n = 0; n < columns; ++n) product[row][n] += operands.a[row][k] * operands.b[k][n];
        }
    }
}

}  // namespace

bool run_product(Cta* cta, int warp_number) {
    Warp& warp = cta->warps[warp_number];
    if (warp.products.empty() || warp.products.front().issued != ~0u) return false;
    const Product product = std::move(warp.products.front());
    warp.products.pop_front();
    ++warp.first_product;

    static Operands operands;
    static float result[16][kMostColumns];
    load_operands(*cta, warp_number, product, &operands);
    multiply(operands, product.columns, result);

    // Lane l holds, of every 8 columns i, d[4 i + 0, 1] of row l / 4, columns 2 (l % 4) + 0, 1, and d[4 i + 2, 3] of
    // the row 8 below.
    Accumulators& to = *product.to;
    const int own = product.columns / 2;
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < own; ++i) {
            float& sum = to.values[lane * own + i];
            const float x = result[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
            sum = product.add ? sum + x : x;
        }
    }
    if (--to.pending > 0) return true;
    for (int lane = 0; lane < 32; ++lane)
        memcpy(to.registers[lane], to.values.data() + lane * own, own * sizeof(float));
    warp.accumulators.erase(std::find(warp.accumulators.begin(), warp.accumulators.end(), product.to));
    return true;
}

// The first lane of a warp that comes makes the product; the accumulators are those of earlier ones with its registers.
static Product make_product(Warp* warp, const float* d, const Product& like) {
    Product product = like;
    for (const auto& accumulators : warp->accumulators) {
        if (accumulators->registers[lane()] == d) product.to = accumulators;
    }
    if (product.to == nullptr) {
        product.to = std::make_shared<Accumulators>();
        product.to->values.resize(32 * like.columns / 2);
        warp->accumulators.push_back(product.to);
    }
    ++product.to->pending;
    return product;
}

// Between the first product and the wait, the registers of A and D belong to the tensor cores: D reads as NaN, and A is
// read when the product is made.
void wgmma(float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, int columns, Element element, bool add) {
    Warp& warp = machine.cta->warps[machine.current->thread / 32];
    const int own = lane();
    Product like;
    like.a = a;
    like.b = b;
    like.columns = columns;
    like.element = element;
    like.add = add;
    like.a_in_registers = a_registers != nullptr;
    const int64_t number = warp.issued[own]++ - warp.first_product;
    if (number == static_cast<int64_t>(warp.products.size())) warp.products.push_back(make_product(&warp, d, like));
    Product& product = warp.products[number];
    if (product.a != a || product.b != b || product.columns != columns || product.add != add ||
        product.a_in_registers != like.a_in_registers)
        fail("wgmma: lanes of a warp differ");
    Accumulators& to = *product.to;
    if (to.registers[own] == nullptr) {
        to.registers[own] = d;
        memcpy(to.values.data() + own * columns / 2, d, columns / 2 * sizeof(float));
        std::fill(d, d + columns / 2, NAN);
    } else if (to.registers[own] != d) {
        fail("wgmma: lanes of a warp have different accumulators");
    }
    product.a_registers[own] = a_registers;
    product.issued |= 1u << own;
}

void wgmma_fence() { converge("wgmma.fence"); }

void wgmma_commit() {
    converge("wgmma.commit_group");
    const int warp_number = machine.current->thread / 32;
    Warp& warp = machine.cta->warps[warp_number];
    const int group = warp.groups[lane()]++;
    for (Product& product : warp.products) {
        if (product.group < 0) product.group = group;
    }
    if (lane() == 0 && one_in(3)) {
        while (run_product(machine.cta, warp_number)) {
        }
    }
}

// wgmma.wait_group: all but the last groups are complete.
void wgmma_wait(int pending) {
    converge("wgmma.wait_group");
    const int warp_number = machine.current->thread / 32;
    Warp& warp = machine.cta->warps[warp_number];
    const int end = warp.groups[lane()] - pending;
    while (!warp.products.empty() && warp.products.front().group >= 0 && warp.products.front().group < end) {
        if (!run_product(machine.cta, warp_number)) fail("wgmma.wait_group: not all lanes have issued a product");
    }
    if (pending == 0 && !warp.products.empty()) fail("wgmma.wait_group: products that were not committed");
}

}  // namespace emulator
