// Numbers as registers hold them: bits of every format, 64 of each register.
static inline float real(uint64_t x) { uint32_t y = (uint32_t)x; float f; memcpy(&f, &y, 4); return f; }
static inline uint64_t bits(float f) { uint32_t y; memcpy(&y, &f, 4); return y; }
static inline uint64_t both(float low, float high) { return bits(high) << 32 | bits(low); }
static inline uint64_t halves(int low, int high) { return (uint32_t)high << 16 | (uint16_t)low; }
static inline double real64(uint64_t x) { double d; memcpy(&d, &x, 8); return d; }
static inline uint64_t bits64(double d) { uint64_t x; memcpy(&x, &d, 8); return x; }

static inline float from_half(uint64_t x) {
    uint32_t sign = (uint32_t)(x >> 15 & 1) << 31, exponent = x >> 10 & 31, fraction = x & 1023;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
    return real(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

static inline uint64_t to_half(float f) {
    uint32_t x = (uint32_t)bits(f), sign = x >> 16 & 0x8000;
    if (isnan(f)) return 0x7fff;
    if (fabsf(f) >= 65520.0f) return sign | 0x7c00;
    if (fabsf(f) < 0x1p-14f) return sign | (uint32_t)lrintf(fabsf(f) * 0x1p24f);
    x &= 0x7fffffff;
    return sign | (((x + 0xfff + (x >> 13 & 1)) >> 13) - (112 << 10));
}

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
