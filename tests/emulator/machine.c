// Executes a kernel's PTX, block after block, the warps of a block in turn between barriers.
//
// Stricter than a GPU: addresses must lie in the launch's tensors and be aligned, shared memory begins as NaN, warps and
// blocks take turns in random order, and asynchronous copies and products happen at once, or as late as their wait allows,
// or now this and now that, so that a missing barrier or wait shows. Not seen: missing fences, since memory here has one
// order, and shuffles that read lanes which take no part.
#include "state.h"

#include "numbers.h"
#include "memory.h"
#include "products.h"

#define EACH(body)                                                       \
    if (mask == ALL) {                                                   \
        for (int i = 0; i < LANES; i++) { body; }                        \
    } else {                                                             \
        for (int i = 0; i < LANES; i++) if (mask >> i & 1) { body; }     \
    }

// A warp until its next barrier, or its end.
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
            if (++warp->steps > LONGEST) fail(m, "does not end");
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
            case mma_bf16: multiply(regs, o, BRAIN); break;
            case mma_f16: multiply(regs, o, HALF); break;
            case mma_tf32: multiply(regs, o, TF32); break;
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
                all[w].registers = regs, all[w].live = ALL, all[w].number = w, all[w].steps = 0, all[w].flight = flight + registers * w;
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
