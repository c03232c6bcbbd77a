// Loads, stores and copies, and what lanes give each other.
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

static void copy_now(Machine *m, const Copy *copy) {
    uint8_t *target = shared_at(m, copy->target, copy->bytes);
    memset(target, 0, copy->bytes);
    if (copy->real) memcpy(target, (void *)copy->source, copy->real);
}

static void finish_copies(Machine *m, Pending *p, uint32_t before) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < p->copy_count; i++)
        if (p->copies[i].group < before) copy_now(m, &p->copies[i]);
        else p->copies[kept++] = p->copies[i];
    p->copy_count = kept;
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
