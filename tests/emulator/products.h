// Tensor-core instructions: of a warp at once (mma), of a group of warps in their own time (wgmma).
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

static void multiply(uint64_t *regs, const int32_t *o, Kind kind) {
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
    int whole = at->guard < 0 && !(warp->flight[o[0]] & READ);
    if (whole && (at->kind == mov_b32 || at->kind == mov_b64) && warp->flight[o[1]] & OWNED) {
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
