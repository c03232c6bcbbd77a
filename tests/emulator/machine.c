// Executes a kernel's PTX, block after block, the warps of a block in turn between barriers.
//
// Stricter than a GPU: addresses must lie in the launch's tensors and be aligned, shared memory begins as NaN, warps and
// blocks take turns in random order, and asynchronous copies and products happen at once, or as late as their wait allows,
// or now this and now that, so that a missing barrier or wait shows.
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LANES 32
#define ALL 0xffffffffu
#define SHARED_BASE 1024

enum {
#define ONE(name, value) name,
#define TWO(name, value) name,
#define THREE(name, value) name,
#include "lanes.h"
#undef ONE
#undef TWO
#undef THREE
#define WARP(name) name,
#include "warps.h"
#undef WARP
    KINDS
};

typedef struct {
    int32_t kind, guard, negated, first, count, results, line;
} Instruction;

typedef struct {
    uint64_t source;
    uint32_t target, bytes, real, group;
} Copy;

typedef struct {
    uint32_t instruction, group;
    uint64_t left, right; // descriptors, which it takes along
    int keep;
} Product; // or a move of what one will give, as compilers place them where loops close

typedef struct {
    Copy *copies;
    Product *products;
    uint32_t copy_count, copy_room, copy_group, product_count, product_room, product_group;
} Pending;

typedef struct {
    uint64_t *registers;
    int32_t pc[LANES];
    uint32_t live;
    int waiting, number;
    Pending pending;
    uint8_t *flight;
} Warp;

typedef struct {
    const Instruction *code;
    const int32_t *operands;
    const uint64_t *ranges;
    int32_t range_count, shared_bytes, timing;
    uint32_t chance;
    int32_t registers;
    uint8_t *shared;
    uint64_t *counts;
    char *message;
    jmp_buf failed;
    const Instruction *current;
} Machine;

static void fail(Machine *m, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int used = snprintf(m->message, 256, "line %d: ", m->current ? m->current->line : 0);
    vsnprintf(m->message + used, 256 - used, format, arguments);
    va_end(arguments);
    longjmp(m->failed, 1);
}

static inline float real(uint64_t x) { uint32_t y = (uint32_t)x; float f; memcpy(&f, &y, 4); return f; }
static inline uint64_t bits(float f) { uint32_t y; memcpy(&y, &f, 4); return y; }
static inline uint64_t both(float low, float high) { return bits(high) << 32 | bits(low); }
static inline uint64_t halves(int low, int high) { return (uint32_t)high << 16 | (uint16_t)low; }
static inline double real64(uint64_t x) { double d; memcpy(&d, &x, 8); return d; }
static inline uint64_t bits64(double d) { uint64_t x; memcpy(&x, &d, 8); return x; }
static inline float from_half(uint64_t x) { uint16_t y = (uint16_t)x; _Float16 h; memcpy(&h, &y, 2); return (float)h; }
static inline uint64_t to_half(float f) { _Float16 h = (_Float16)f; uint16_t y; memcpy(&y, &h, 2); return y; }

static inline uint64_t to_brain(float f) {
    uint32_t x = (uint32_t)bits(f);
    if (isnan(f)) return 0x7fff;
    return (x + 0x7fff + (x >> 16 & 1)) >> 16;
}

static inline uint64_t to_tf32(uint64_t a) {
    uint32_t x = (uint32_t)a;
    if ((x & 0x7f800000u) == 0x7f800000u) return x;
    return (x + 0x1000) & ~0x1fffu;
}

static inline int64_t to_integer(double x, int64_t low, int64_t high) {
    if (isnan(x)) return 0;
    if (x <= (double)low) return low;
    if (x >= (double)high) return high;
    return (int64_t)x;
}

static inline uint64_t field(uint64_t a, uint64_t start, uint64_t length, int is_signed) {
    uint32_t from = start & 0xff, bits = length & 0xff;
    if (bits == 0) return 0;
    int64_t wide = is_signed ? (int64_t)(int32_t)a : (int64_t)(uint32_t)a;
    wide >>= from > 63 ? 63 : from;
    if (bits >= 32) return (uint32_t)wide;
    uint32_t cut = (uint32_t)wide & ((1u << bits) - 1);
    return is_signed && (cut >> (bits - 1)) ? cut | ~((1u << bits) - 1) : cut;
}

static inline uint64_t permuted(uint64_t a, uint64_t b, uint64_t selector) {
    uint64_t both = (b << 32) | (uint32_t)a, result = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t which = selector >> (4 * i) & 0xf, byte = both >> (8 * (which & 7)) & 0xff;
        if (which & 8) byte = byte >> 7 ? 0xff : 0;
        result |= (uint64_t)byte << (8 * i);
    }
    return result;
}

static void check_global(Machine *m, uint64_t address, uint32_t bytes) {
    if (address % bytes) fail(m, "global address is not a multiple of %u", bytes);
    for (int i = 0; i < m->range_count; i++)
        if (address >= m->ranges[2 * i] && address + bytes <= m->ranges[2 * i + 1]) return;
    fail(m, "global address lies outside every tensor of the launch");
}

static uint8_t *shared_at(Machine *m, uint32_t address, uint32_t bytes) {
    if (address % bytes) fail(m, "shared address %u is not a multiple of %u", address, bytes);
    if (address < SHARED_BASE || address + bytes > SHARED_BASE + (uint32_t)m->shared_bytes)
        fail(m, "shared address %u + %u lies outside %d bytes", address, bytes, m->shared_bytes);
    return m->shared + address - SHARED_BASE;
}

static uint32_t next_random(uint32_t *state) { return *state = *state * 1664525u + 1013904223u; }

enum { EARLY, LATE, MIXED };

static int is_late(Machine *m) { return m->timing == MIXED ? next_random(&m->chance) >> 16 & 1 : m->timing == LATE; }

static void copy_now(Machine *m, const Copy *copy) {
    uint8_t *target = shared_at(m, copy->target, copy->bytes);
    memset(target, 0, copy->bytes);
    if (copy->real) memcpy(target, (void *)copy->source, copy->real);
}

// Products ---------------------------------------------------------------------------------------------------------

typedef enum { BRAIN, HALF, TF32 } Kind;

static inline float part(uint32_t x, int upper, Kind kind) {
    if (kind == TF32) return real(x & ~0x1fffu);
    uint32_t y = upper ? x >> 16 : x & 0xffff;
    return kind == BRAIN ? real((uint64_t)y << 16) : from_half(y);
}

// A warp's fragment of 16 rows by 16 columns (8 of tf32), from four registers of each lane.
static void read_fragment(const uint64_t *const *a, Kind kind, float out[16][16]) {
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < 4; i++) {
            int row = lane / 4 + 8 * (i & 1), column = lane % 4;
            uint32_t x = (uint32_t)a[i][lane];
            if (kind == TF32) {
                out[row][column + 4 * (i >> 1)] = part(x, 0, kind);
            } else {
                out[row][2 * column + 8 * (i >> 1)] = part(x, 0, kind);
                out[row][2 * column + 8 * (i >> 1) + 1] = part(x, 1, kind);
            }
        }
}

static void multiply(Machine *m, uint64_t *regs, const int32_t *o, Kind kind) {
    int depth = kind == TF32 ? 8 : 16;
    const uint64_t *a[4] = {regs + LANES * o[4], regs + LANES * o[5], regs + LANES * o[6], regs + LANES * o[7]};
    const uint64_t *b[2] = {regs + LANES * o[8], regs + LANES * o[9]};
    float left[16][16], right[16][8], sums[16][8];
    read_fragment(a, kind, left);
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < 2; i++) {
            int column = lane / 4, row = lane % 4;
            if (kind == TF32) {
                right[row + 4 * i][column] = part((uint32_t)b[i][lane], 0, kind);
            } else {
                right[2 * row + 8 * i][column] = part((uint32_t)b[i][lane], 0, kind);
                right[2 * row + 8 * i + 1][column] = part((uint32_t)b[i][lane], 1, kind);
            }
        }
    memset(sums, 0, sizeof sums);
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < depth; k++)
            for (int j = 0; j < 8; j++) sums[i][j] += left[i][k] * right[k][j];
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < 4; i++) {
            float c = real(regs[LANES * o[10 + i] + lane]);
            regs[LANES * o[i] + lane] = bits(c + sums[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)]);
        }
    (void)m;
}

// Shared address of an element of a wgmma operand: row `at` of the operand's own dimension, `k` of the summed one.
static uint32_t described(Machine *m, uint64_t descriptor, int at, int k, int bytes, int transposed) {
    uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    uint32_t stride = (descriptor >> 32 & 0x3fff) << 4, mode = descriptor >> 62;
    static const uint32_t widths[4] = {16, 128, 64, 32}, swizzles[4] = {0, 7, 3, 1};
    uint32_t width = widths[mode], address = start;
    if (descriptor >> 49 & 7) fail(m, "descriptor with a base offset");
    if (transposed && mode == 0)
        address += at % 8 * bytes + at / 8 * stride + k % 8 * 16 + k / 8 * leading;
    else if (transposed)
        address += at % (width / bytes) * bytes + at / (width / bytes) * leading + k % 8 * width + k / 8 * stride;
    else if (mode == 0)
        address += at % 8 * 16 + at / 8 * stride + k * bytes / 16 * leading + k * bytes % 16;
    else
        address += at % 8 * width + at / 8 * stride + k * bytes;
    return address ^ (address >> 7 & swizzles[mode]) << 4;
}

static float described_value(Machine *m, uint64_t descriptor, int at, int k, Kind kind, int transposed) {
    int bytes = kind == TF32 ? 4 : 2;
    const uint8_t *place = shared_at(m, described(m, descriptor, at, k, bytes, transposed), bytes);
    uint32_t x = 0;
    memcpy(&x, place, bytes);
    return part(x, 0, kind);
}

// Operands: columns, kind, A in registers, B's descriptor, add to D, negate A, negate B, transpose A, transpose B, A, D.
static void multiply_group(Machine *m, Warp *warp, const Product *product) {
    const int32_t *o = m->operands + m->code[product->instruction].first;
    uint64_t *regs = warp->registers;
#define VALUE(i) regs[LANES * o[i]]
    int columns = (int)VALUE(0), in_registers = (int)VALUE(2), transpose_a = (int)VALUE(7), transpose_b = (int)VALUE(8);
    Kind kind = (Kind)VALUE(1);
    int depth = kind == TF32 ? 8 : 16, slab = warp->number % 4 * 16;
    if ((int64_t)VALUE(5) != 1 || (int64_t)VALUE(6) != 1) fail(m, "negated operand");
    float left[16][16];
    static float right[16][256];
    if (in_registers) {
        const uint64_t *a[4] = {&VALUE(9), &VALUE(10), &VALUE(11), &VALUE(12)};
        read_fragment(a, kind, left);
    } else {
        for (int i = 0; i < 16; i++)
            for (int k = 0; k < depth; k++) left[i][k] = described_value(m, product->left, slab + i, k, kind, transpose_a);
    }
    for (int k = 0; k < depth; k++)
        for (int j = 0; j < columns; j++) right[k][j] = described_value(m, product->right, j, k, kind, transpose_b);
    const int32_t *d = o + (in_registers ? 13 : 10);
    for (int i = 0; i < 16; i++) {
        float sums[256] = {0};
        for (int k = 0; k < depth; k++)
            for (int j = 0; j < columns; j++) sums[j] += left[i][k] * right[k][j];
        for (int j = 0; j < columns; j++) {
            int lane = i % 8 * 4 + j % 8 / 2;
            uint64_t *place = regs + LANES * d[j / 8 * 4 + i / 8 * 2 + j % 2] + lane;
            *place = bits((product->keep ? real(*place) : 0.0f) + sums[j]);
        }
    }
#undef VALUE
}

static void finish_copies(Machine *m, Pending *p, uint32_t before) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < p->copy_count; i++)
        if (p->copies[i].group < before) copy_now(m, &p->copies[i]);
        else p->copies[kept++] = p->copies[i];
    p->copy_count = kept;
}

static void *grown(void *items, uint32_t count, uint32_t *room, size_t size) {
    if (count < *room) return items;
    *room = *room ? 2 * *room : 256;
    return realloc(items, *room * size);
}

// A product in flight reads its A and owns its result: until a wait, nothing may write the one or touch the other.
enum { READ = 1, OWNED = 2 };

static void mark(Machine *m, Warp *warp, const Product *product) {
    const Instruction *at = &m->code[product->instruction];
    const int32_t *o = m->operands + at->first;
    if (at->kind != wgmma_mma) {
        warp->flight[o[0]] = OWNED;
        return;
    }
    int held = warp->registers[LANES * o[2]] ? 4 : 0;
    for (int i = 9; i < 9 + held; i++) warp->flight[o[i]] |= READ;
    for (int i = held ? 13 : 10; i < at->count; i++) warp->flight[o[i]] |= OWNED;
}

static void start_product(Machine *m, Warp *warp, uint32_t instruction) {
    Pending *p = &warp->pending;
    const Instruction *at = &m->code[instruction];
    const int32_t *o = m->operands + at->first;
    Product product = {instruction, p->product_group, 0, 0, 0};
    if (at->kind == wgmma_mma) {
        product.left = warp->registers[LANES * o[9]], product.right = warp->registers[LANES * o[3]];
        product.keep = warp->registers[LANES * o[4]] & 1;
        if (!p->product_count && !is_late(m)) {
            multiply_group(m, warp, &product);
            return;
        }
        int held = warp->registers[LANES * o[2]] ? 4 : 0;
        for (int i = 9; i < 9 + held; i++)
            if (warp->flight[o[i]] & OWNED) fail(m, "multiplies a product that nothing waited for");
        for (int i = held ? 13 : 10; i < at->count; i++)
            if (warp->flight[o[i]] & READ) fail(m, "adds to what a product in flight multiplies");
    }
    p->products = grown(p->products, p->product_count, &p->product_room, sizeof *p->products);
    p->products[p->product_count++] = product;
    mark(m, warp, &p->products[p->product_count - 1]);
}

static void finish_products(Machine *m, Warp *warp, uint32_t before) {
    Pending *p = &warp->pending;
    uint32_t kept = 0, count = p->product_count;
    memset(warp->flight, 0, m->registers);
    for (uint32_t i = 0; i < count; i++) {
        const Product product = p->products[i];
        const Instruction *at = &m->code[product.instruction];
        const int32_t *o = m->operands + at->first;
        int follows = at->kind != wgmma_mma && warp->flight[o[1]] & OWNED;
        if (follows || (at->kind == wgmma_mma && product.group >= before)) {
            p->products[kept++] = product;
            mark(m, warp, &product);
        } else if (at->kind == wgmma_mma) {
            multiply_group(m, warp, &product);
        } else {
            memcpy(warp->registers + LANES * o[0], warp->registers + LANES * o[1], sizeof(uint64_t) * LANES);
        }
    }
    p->product_count = kept;
}

// Whether an instruction waits in line with the products that are in flight; fails where it may not come before them.
static int in_line(Machine *m, Warp *warp, const Instruction *at, uint32_t pc) {
    const int32_t *o = m->operands + at->first;
    if (at->kind == wgmma_mma || at->kind == bra) return 0;
    if ((at->kind == mov_b32 || at->kind == mov_b64) && warp->flight[o[1]] & OWNED) {
        start_product(m, warp, pc);
        return 1;
    }
    for (int i = 0; i < at->count; i++) {
        uint8_t flight = warp->flight[o[i]];
        if (i < at->results ? flight : flight & OWNED)
            fail(m, "%s a register of a product that nothing waited for", i < at->results ? "writes" : "reads");
    }
    return 0;
}

// A warp until its next barrier ------------------------------------------------------------------------------------

#define EACH(body)                                                       \
    if (mask == ALL) {                                                   \
        for (int i = 0; i < LANES; i++) { body; }                        \
    } else {                                                             \
        for (int i = 0; i < LANES; i++) if (mask >> i & 1) { body; }     \
    }

static void load_or_store(Machine *m, Warp *warp, const int32_t *o, int count, uint32_t mask, int bytes, int shared,
                          int store, int sign) {
    uint64_t *regs = warp->registers;
    int parts = count - 2;
    const uint64_t *base = regs + LANES * o[store ? 0 : parts], *offset = regs + LANES * o[store ? 1 : parts + 1];
    const int32_t *values = store ? o + 2 : o;
    for (int i = 0; i < LANES; i++) {
        if (!(mask >> i & 1)) continue;
        uint64_t address = base[i] + offset[i];
        uint8_t *place;
        if (shared) {
            place = shared_at(m, (uint32_t)address, bytes * parts);
        } else {
            check_global(m, address, bytes * parts);
            place = (uint8_t *)address;
        }
        for (int j = 0; j < parts; j++) {
            uint64_t *value = regs + LANES * values[j] + i;
            if (store) {
                memcpy(place + j * bytes, value, bytes);
            } else {
                uint64_t got = 0;
                memcpy(&got, place + j * bytes, bytes);
                *value = sign ? (uint64_t)(int64_t)(int32_t)got : got;
            }
        }
    }
}

static void move_matrices(Machine *m, Warp *warp, const int32_t *o, int count, int transposed, int store) {
    uint64_t *regs = warp->registers;
    int matrices = count - 2;
    const uint64_t *base = regs + LANES * o[store ? 0 : matrices], *offset = regs + LANES * o[store ? 1 : matrices + 1];
    const int32_t *values = store ? o + 2 : o;
    for (int j = 0; j < matrices; j++) {
        uint16_t *rows[8];
        for (int r = 0; r < 8; r++)
            rows[r] = (uint16_t *)shared_at(m, (uint32_t)(base[8 * j + r] + offset[8 * j + r]), 16);
        for (int i = 0; i < LANES; i++) {
            uint64_t *value = regs + LANES * values[j] + i;
            int row = i / 4, column = i % 4 * 2;
            uint16_t *low = transposed ? &rows[column][row] : &rows[row][column];
            uint16_t *high = transposed ? &rows[column + 1][row] : &rows[row][column + 1];
            if (store) *low = (uint16_t)*value, *high = (uint16_t)(*value >> 16);
            else *value = *low | (uint32_t)*high << 16;
        }
    }
}

static void shuffle(uint64_t *regs, const int32_t *o, uint32_t mask, int how) {
    const uint64_t *a = regs + LANES * o[1], *b = regs + LANES * o[2];
    uint64_t before[LANES];
    memcpy(before, a, sizeof before);
    for (int i = 0; i < LANES; i++) {
        if (!(mask >> i & 1)) continue;
        int from = how == shfl_bfly ? i ^ (int)b[i] : how == shfl_idx ? (int)b[i] & 31 : i - (int)b[i];
        if (how == shfl_down) from = i + (int)b[i];
        regs[LANES * o[0] + i] = from < 0 || from > 31 ? before[i] : before[from];
    }
}

static void reduce(uint64_t *regs, const int32_t *o, uint32_t mask, int how) {
    const uint64_t *a = regs + LANES * o[1], *members = regs + LANES * o[2];
    for (int i = 0; i < LANES; i++) {
        if (!(mask >> i & 1)) continue;
        uint32_t group = (uint32_t)members[i] & mask, all = 0;
        int started = 0;
        for (int j = 0; j < LANES; j++) {
            if (!(group >> j & 1)) continue;
            uint32_t x = (uint32_t)a[j];
            if (!started) all = x;
            else if (how == redux_add_s32) all += x;
            else if (how == redux_max_s32) all = (int32_t)x > (int32_t)all ? x : all;
            else if (how == redux_min_s32) all = (int32_t)x < (int32_t)all ? x : all;
            else if (how == redux_max_u32) all = x > all ? x : all;
            else all = x < all ? x : all;
            started = 1;
        }
        regs[LANES * o[0] + i] = all;
    }
}

static void run_warp(Machine *m, Warp *warp) {
    uint64_t *regs = warp->registers;
    while (warp->live) {
        int32_t pc = INT32_MAX;
        uint32_t here = 0;
        for (int i = 0; i < LANES; i++)
            if (warp->live >> i & 1) {
                if (warp->pc[i] < pc) pc = warp->pc[i], here = 0;
                if (warp->pc[i] == pc) here |= 1u << i;
            }
        // Lanes that are together stay together until one of them branches or all have reached those that are ahead.
        int32_t meet = INT32_MAX;
        for (int i = 0; i < LANES; i++)
            if (warp->live >> i & 1 && warp->pc[i] > pc && warp->pc[i] < meet) meet = warp->pc[i];
        for (;; pc++) {
            if (pc == meet) break;
            const Instruction *at = &m->code[pc];
            const int32_t *o = m->operands + at->first;
            uint32_t mask = here;
            m->current = at;
            if (at->guard >= 0) {
                const uint64_t *guard = regs + LANES * at->guard;
                uint32_t on = 0;
                for (int i = 0; i < LANES; i++) on |= (uint32_t)(guard[i] & 1) << i;
                mask &= at->negated ? ~on : on;
            }
            m->counts[pc]++;
            if (warp->pending.product_count && in_line(m, warp, at, (uint32_t)pc)) continue;
#define REG(k) (regs + LANES * (size_t)o[k])
            switch (at->kind) {
#define ONE(name, value) case name: { \
    uint64_t *d = REG(0); const uint64_t *a = REG(1); EACH(const uint64_t A = a[i]; d[i] = (value)) break; }
#define TWO(name, value) case name: { \
    uint64_t *d = REG(0); const uint64_t *a = REG(1), *b = REG(2); \
    EACH(const uint64_t A = a[i]; const uint64_t B = b[i]; d[i] = (value)) break; }
#define THREE(name, value) case name: { \
    uint64_t *d = REG(0); const uint64_t *a = REG(1), *b = REG(2), *c = REG(3); \
    EACH(const uint64_t A = a[i]; const uint64_t B = b[i]; const uint64_t C = c[i]; d[i] = (value)) break; }
#include "lanes.h"
            case pack_b32: EACH(REG(0)[i] = (uint16_t)REG(1)[i] | (uint32_t)REG(2)[i] << 16) break;
            case pack_b64: EACH(REG(0)[i] = (uint32_t)REG(1)[i] | REG(2)[i] << 32) break;
            case unpack_b32: EACH(uint64_t x = REG(2)[i]; REG(0)[i] = (uint16_t)x; REG(1)[i] = (uint16_t)(x >> 16)) break;
            case unpack_b64: EACH(uint64_t x = REG(2)[i]; REG(0)[i] = (uint32_t)x; REG(1)[i] = x >> 32) break;
            case ld_global_b8: load_or_store(m, warp, o, at->count, mask, 1, 0, 0, 0); break;
            case ld_global_b16: load_or_store(m, warp, o, at->count, mask, 2, 0, 0, 0); break;
            case ld_global_b32: load_or_store(m, warp, o, at->count, mask, 4, 0, 0, 0); break;
            case ld_global_b64: load_or_store(m, warp, o, at->count, mask, 8, 0, 0, 0); break;
            case st_global_b8: load_or_store(m, warp, o, at->count, mask, 1, 0, 1, 0); break;
            case st_global_b16: load_or_store(m, warp, o, at->count, mask, 2, 0, 1, 0); break;
            case st_global_b32: load_or_store(m, warp, o, at->count, mask, 4, 0, 1, 0); break;
            case st_global_b64: load_or_store(m, warp, o, at->count, mask, 8, 0, 1, 0); break;
            case ld_shared_b8: load_or_store(m, warp, o, at->count, mask, 1, 1, 0, 0); break;
            case ld_shared_b16: load_or_store(m, warp, o, at->count, mask, 2, 1, 0, 0); break;
            case ld_shared_b32: load_or_store(m, warp, o, at->count, mask, 4, 1, 0, 0); break;
            case ld_shared_s32: load_or_store(m, warp, o, at->count, mask, 4, 1, 0, 1); break;
            case ld_shared_b64: load_or_store(m, warp, o, at->count, mask, 8, 1, 0, 0); break;
            case st_shared_b8: load_or_store(m, warp, o, at->count, mask, 1, 1, 1, 0); break;
            case st_shared_b16: load_or_store(m, warp, o, at->count, mask, 2, 1, 1, 0); break;
            case st_shared_b32: load_or_store(m, warp, o, at->count, mask, 4, 1, 1, 0); break;
            case st_shared_b64: load_or_store(m, warp, o, at->count, mask, 8, 1, 1, 0); break;
            case ldmatrix: move_matrices(m, warp, o, at->count, 0, 0); break;
            case ldmatrix_trans: move_matrices(m, warp, o, at->count, 1, 0); break;
            case stmatrix: move_matrices(m, warp, o, at->count, 0, 1); break;
            case stmatrix_trans: move_matrices(m, warp, o, at->count, 1, 1); break;
            case shfl_bfly: case shfl_idx: case shfl_up: case shfl_down: shuffle(regs, o, mask, at->kind); break;
            case redux_add_s32: case redux_max_s32: case redux_min_s32: case redux_max_u32: case redux_min_u32:
                reduce(regs, o, mask, at->kind);
                break;
            case cp_async:
                for (int i = 0; i < LANES; i++) {
                    if (!(mask >> i & 1)) continue;
                    Copy copy = {REG(2)[i] + REG(3)[i], (uint32_t)(REG(0)[i] + REG(1)[i]), (uint32_t)REG(4)[i], 0, 0};
                    copy.real = at->count > 5 ? (uint32_t)REG(5)[i] : copy.bytes;
                    copy.group = warp->pending.copy_group;
                    if (copy.real) check_global(m, copy.source, copy.bytes);
                    Pending *p = &warp->pending;
                    if (!is_late(m)) copy_now(m, &copy);
                    else {
                        p->copies = grown(p->copies, p->copy_count, &p->copy_room, sizeof *p->copies);
                        p->copies[p->copy_count++] = copy;
                    }
                }
                break;
            case cp_async_commit_group: warp->pending.copy_group++; break;
            case cp_async_wait_group: {
                uint32_t done = warp->pending.copy_group, left = (uint32_t)REG(0)[0];
                finish_copies(m, &warp->pending, done > left ? done - left : 0);
                break;
            }
            case mma_bf16: multiply(m, regs, o, BRAIN); break;
            case mma_f16: multiply(m, regs, o, HALF); break;
            case mma_tf32: multiply(m, regs, o, TF32); break;
            case wgmma_mma: {
                if (mask != ALL) fail(m, "wgmma in a part of a warp");
                start_product(m, warp, (uint32_t)pc);
                break;
            }
            case wgmma_commit_group: warp->pending.product_group++; break;
            case wgmma_wait_group: {
                uint32_t done = warp->pending.product_group, left = (uint32_t)REG(0)[0];
                finish_products(m, warp, done > left ? done - left : 0);
                break;
            }
            case nothing: break;
            case bar_sync:
                if (here != warp->live) fail(m, "barrier in a part of a warp");
                warp->waiting = (int)REG(0)[0];
                for (int i = 0; i < LANES; i++) warp->pc[i] = pc + 1;
                return;
            case bra:
                for (int i = 0; i < LANES; i++)
                    if (here >> i & 1) warp->pc[i] = mask >> i & 1 ? o[0] : pc + 1;
                if (mask != here || mask != warp->live) goto parted;
                pc = o[0] - 1;
                break;
            case ret:
                warp->live &= ~mask;
                for (int i = 0; i < LANES; i++)
                    if (here >> i & 1) warp->pc[i] = pc + 1;
                goto parted;
            default: fail(m, "unknown instruction %d", at->kind);
            }
        }
        for (int i = 0; i < LANES; i++)
            if (here >> i & 1) warp->pc[i] = pc;
    parted:;
    }
    warp->waiting = -1;
}

static void mix(int *order, int count, uint32_t *state) {
    for (int i = 0; i < count; i++) order[i] = i;
    for (int i = count - 1; i > 0; i--) {
        int j = (int)((next_random(state) >> 8) % (uint32_t)(i + 1)), kept = order[i];
        order[i] = order[j], order[j] = kept;
    }
}

// initial: the registers of one warp as constants, parameters and poison have them. places: where tid.x, ctaid.x/y/z lie.
int execute(const Instruction *code, const int32_t *operands, const uint64_t *initial, int32_t registers,
            const int32_t *places, const int32_t *grid, int32_t warps, int32_t shared_bytes, const uint64_t *ranges,
            int32_t range_count, int32_t timing, uint32_t seed, uint64_t *counts, char *message) {
    Machine machine = {code, operands, ranges, range_count, shared_bytes, timing, seed, registers, NULL, counts, message};
    Machine *m = &machine;
    size_t each = (size_t)registers * LANES;
    Warp *all = calloc(warps, sizeof *all);
    uint64_t *file = malloc(sizeof(uint64_t) * each * warps);
    uint8_t *flight = calloc(registers, warps);
    int blocks = grid[0] * grid[1] * grid[2], status = 0, *order = malloc(sizeof(int) * (blocks + warps));
    int *turns = order + blocks;
    m->shared = aligned_alloc(1024, (shared_bytes / 1024 + 1) * 1024);
    mix(order, blocks, &seed);
    if (setjmp(m->failed)) {
        status = 1;
    } else {
        for (int n = 0; n < blocks; n++) {
            int block = order[n];
            memset(m->shared, 0xff, shared_bytes);
            for (int w = 0; w < warps; w++) {
                uint64_t *regs = file + each * w;
                memcpy(regs, initial, sizeof(uint64_t) * each);
                for (int i = 0; i < LANES; i++) {
                    regs[LANES * places[0] + i] = 32 * w + i;
                    regs[LANES * places[1] + i] = block % grid[0];
                    regs[LANES * places[2] + i] = block / grid[0] % grid[1];
                    regs[LANES * places[3] + i] = block / grid[0] / grid[1];
                    all[w].pc[i] = 0;
                }
                all[w].registers = regs, all[w].live = ALL, all[w].number = w, all[w].flight = flight + registers * w;
                all[w].pending.copy_count = all[w].pending.product_count = 0;
            }
            int running = warps;
            while (running) {
                mix(turns, warps, &seed);
                int barrier = -2;
                running = 0;
                for (int t = 0; t < warps; t++) {
                    Warp *warp = &all[turns[t]];
                    if (!warp->live) continue;
                    run_warp(m, warp);
                    if (!warp->live) {
                        if (warp->pending.product_count) fail(m, "ends with products that nothing waits for");
                        finish_copies(m, &warp->pending, ALL);
                        continue;
                    }
                    if (barrier != -2 && barrier != warp->waiting) fail(m, "warps wait at different barriers");
                    barrier = warp->waiting;
                    running++;
                }
            }
        }
    }
    for (int w = 0; w < warps; w++) free(all[w].pending.copies), free(all[w].pending.products);
    free(all), free(file), free(flight), free(order), free(m->shared);
    return status;
}
