-- A dissector of ZCP/1 for Wireshark 4.4 and later. README.md explains how to install and use it.
--
-- Frames are reassembled here and not by the TLS dissector, which shows incomplete data as a field of raw bytes: tokens
-- would be readable in it.
--
-- All input is from the network. It must not raise an error, cause an endless loop, or allocate memory out of
-- proportion to its size.

if not utf8 then
    error("zcp.lua needs Wireshark 4.4 or later, which has Lua 5.4")
end

local zcp = Proto("zcp", "ZCP/1")

local HEADER = 68
local MIN_LENGTH = 64
local MAX_DEPTH = 32
local MAX_METHOD = 128
local MAX_SHOWN = 5000 -- values of one body in the tree; Wireshark takes far more items for a loop
local MAX_PREVIEW = 72 -- characters of the short form of a map or an array
local MAX_INFO = 8 -- frames that the Info column names
local NO_TOKEN = string.rep("\0", 32)

local WELCOME, REQUEST, RESPONSE, ERROR, CANCEL, PING, PONG, GOAWAY, EVENT = 1, 2, 3, 4, 5, 6, 7, 8, 9
local OPEN, ITEM, END, CREDIT, ACCEPTED, CALL, RESULT, FAILURE, WITHDRAW = 16, 17, 18, 19, 20, 24, 25, 26, 27
local MAX_CREDIT = (1 << 53) - 1

-- The tables of zcp1.md, sections 6.1 and 18.2. `stream` is 0 or not 0, nil for either. `part_of`: the key of WELCOME that
-- announces the kind.
local KINDS = {
    [WELCOME] = { name = "WELCOME", sender = "server", stream = "zero", body = true },
    [REQUEST] = { name = "REQUEST", sender = "client", stream = "number", body = true },
    [RESPONSE] = { name = "RESPONSE", sender = "server", stream = "number", body = true },
    [ERROR] = { name = "ERROR", sender = "server", body = true },
    [CANCEL] = { name = "CANCEL", sender = "client", stream = "number", body = false },
    [PING] = { name = "PING", stream = "zero", body = false },
    [PONG] = { name = "PONG", stream = "zero", body = false },
    [GOAWAY] = { name = "GOAWAY", sender = "server", stream = "zero", body = true },
    [EVENT] = { name = "EVENT", sender = "server", stream = "zero", body = true },
    [OPEN] = { name = "OPEN", sender = "client", stream = "number", body = true, part_of = "streams" },
    [ITEM] = { name = "ITEM", stream = "number", body = true, part_of = "streams" },
    [END] = { name = "END", sender = "client", stream = "number", body = false, part_of = "streams" },
    [CREDIT] = { name = "CREDIT", stream = "number", body = true, part_of = "streams" },
    [ACCEPTED] = { name = "ACCEPTED", sender = "server", stream = "number", body = true, part_of = "durable streams" },
    [CALL] = { name = "CALL", sender = "server", stream = "number", body = true, part_of = "calls" },
    [RESULT] = { name = "RESULT", sender = "client", stream = "number", body = true, part_of = "calls" },
    [FAILURE] = { name = "FAILURE", sender = "client", stream = "number", body = true, part_of = "calls" },
    [WITHDRAW] = { name = "WITHDRAW", sender = "server", stream = "number", body = false, part_of = "calls" },
}

local KIND_NAMES = {}
for kind, rule in pairs(KINDS) do
    KIND_NAMES[kind] = rule.name
end

local CODES = {
    [1] = "CANCELLED",
    [2] = "UNKNOWN",
    [3] = "INVALID_ARGUMENT",
    [4] = "DEADLINE_EXCEEDED",
    [5] = "NOT_FOUND",
    [6] = "ALREADY_EXISTS",
    [7] = "PERMISSION_DENIED",
    [8] = "RESOURCE_EXHAUSTED",
    [9] = "FAILED_PRECONDITION",
    [10] = "ABORTED",
    [11] = "OUT_OF_RANGE",
    [12] = "UNIMPLEMENTED",
    [13] = "INTERNAL",
    [14] = "UNAVAILABLE",
    [15] = "DATA_LOSS",
    [16] = "UNAUTHENTICATED",
    [64] = "PROTOCOL_ERROR",
    [65] = "FRAME_TOO_LARGE",
    [66] = "REPLAYED",
    [67] = "STALE_TIMESTAMP",
    [68] = "TOKEN_EXPIRED",
    [69] = "TOKEN_REVOKED",
    [70] = "SESSION_REPLACED",
}

-- --- preferences ---------------------------------------------------------------------------------------------

zcp.prefs.port = Pref.uint("TLS port", 7443, "Port taken for ZCP/1 where the ALPN is not known; 0 for none")
zcp.prefs.max_length = Pref.uint("Largest length", 1048576, "A frame that declares more is shown as a fault")
zcp.prefs.show_secrets =
    Pref.bool("Show secrets", false, "Show tokens, keys, codes and signatures, which are masked otherwise")

-- --- fields --------------------------------------------------------------------------------------------------

local f = {
    length = ProtoField.uint32("zcp.length", "Length"),
    version = ProtoField.uint8("zcp.version", "Version"),
    kind = ProtoField.uint8("zcp.kind", "Kind", base.DEC, KIND_NAMES),
    flags = ProtoField.uint16("zcp.flags", "Flags", base.HEX),
    stream = ProtoField.uint32("zcp.stream", "Stream"),
    timestamp = ProtoField.absolute_time("zcp.timestamp", "Timestamp", base.UTC),
    timestamp_ms = ProtoField.uint64("zcp.timestamp_ms", "Milliseconds since 1970"),
    salt = ProtoField.bytes("zcp.salt", "Salt", base.NONE),
    counter = ProtoField.uint64("zcp.counter", "Counter"),
    token = ProtoField.string("zcp.token", "Token"),
    token_number = ProtoField.uint32("zcp.token_number", "Token's number in this capture"),

    sender = ProtoField.string("zcp.sender", "Sender"),
    request_in = ProtoField.framenum("zcp.request_in", "Request in", base.NONE, frametype.REQUEST),
    answer_in = ProtoField.framenum("zcp.answer_in", "Answer in", base.NONE, frametype.RESPONSE),
    time = ProtoField.relative_time("zcp.time", "Time from request to answer"),
    begins_in = ProtoField.framenum("zcp.begins_in", "Frame begins in"),
    complete_in = ProtoField.framenum("zcp.complete_in", "Frame is complete in"),

    body = ProtoField.none("zcp.body", "Body"),
    method = ProtoField.string("zcp.method", "Method"),
    params = ProtoField.none("zcp.params", "Params"),
    meta = ProtoField.none("zcp.meta", "Meta"),
    deadline_ms = ProtoField.int64("zcp.meta.deadline_ms", "deadline_ms"),
    idempotency_key = ProtoField.string("zcp.meta.idempotency_key", "idempotency_key"),
    traceparent = ProtoField.string("zcp.meta.traceparent", "traceparent"),
    pending = ProtoField.string("zcp.meta.pending", "pending"),
    credit = ProtoField.none("zcp.meta.credit", "credit"),
    credit_items = ProtoField.int64("zcp.credit.items", "Items"),
    resume = ProtoField.none("zcp.meta.resume", "resume"),
    credit_bytes = ProtoField.int64("zcp.credit.bytes", "Bytes"),
    credit_taken = ProtoField.int64("zcp.credit.taken", "Taken"),
    accepted = ProtoField.none("zcp.accepted", "ACCEPTED"),
    item = ProtoField.none("zcp.item", "Item"),
    result = ProtoField.none("zcp.result", "Result"),
    code = ProtoField.int64("zcp.error.code", "Code", base.DEC, CODES),
    message = ProtoField.string("zcp.error.message", "Message"),
    details = ProtoField.none("zcp.error.details", "Details"),
    event_name = ProtoField.string("zcp.event.name", "Name"),
    event_data = ProtoField.none("zcp.event.data", "Data"),
    goaway = ProtoField.none("zcp.goaway", "GOAWAY"),
    reason = ProtoField.string("zcp.goaway.reason", "reason"),
    retry_after_ms = ProtoField.int64("zcp.goaway.retry_after_ms", "retry_after_ms"),
    welcome = ProtoField.none("zcp.welcome", "WELCOME"),
    server = ProtoField.string("zcp.welcome.server", "server"),
    versions = ProtoField.none("zcp.welcome.versions", "versions"),
    max_frame = ProtoField.int64("zcp.welcome.max_frame", "max_frame"),
    max_streams = ProtoField.int64("zcp.welcome.max_streams", "max_streams"),
    idle_timeout_ms = ProtoField.int64("zcp.welcome.idle_timeout_ms", "idle_timeout_ms"),
    tolerance_ms = ProtoField.int64("zcp.welcome.tolerance_ms", "tolerance_ms"),
    sts = ProtoField.none("zcp.welcome.sts", "sts"),
    max_age = ProtoField.int64("zcp.welcome.sts.max_age", "max_age"),
    include_subdomains = ProtoField.bool("zcp.welcome.sts.include_subdomains", "include_subdomains"),
    streams = ProtoField.none("zcp.welcome.streams", "streams"),
    max_open = ProtoField.int64("zcp.welcome.streams.max_open", "max_open"),
    durable = ProtoField.bool("zcp.welcome.streams.durable", "durable"),
    max_item = ProtoField.int64("zcp.welcome.streams.max_item", "max_item"),
    calls = ProtoField.none("zcp.welcome.calls", "calls"),
    max_calls = ProtoField.int64("zcp.welcome.calls.max", "max"),

    path = ProtoField.string("zcp.path", "Path"),
    v_nil = ProtoField.none("zcp.value.nil", "nil"),
    v_bool = ProtoField.bool("zcp.value.bool", "bool"),
    v_int = ProtoField.int64("zcp.value.int", "int"),
    v_uint = ProtoField.uint64("zcp.value.uint", "int of 2^63 or more"),
    v_float = ProtoField.double("zcp.value.float", "float"),
    v_str = ProtoField.string("zcp.value.str", "str"),
    v_bin = ProtoField.bytes("zcp.value.bin", "bin", base.NONE),
    v_array = ProtoField.none("zcp.value.array", "array"),
    v_map = ProtoField.none("zcp.value.map", "map"),
    v_masked = ProtoField.string("zcp.value.masked", "masked"),
}

zcp.fields = f

local FIELD_OF_TYPE = {
    ["nil"] = f.v_nil,
    bool = f.v_bool,
    int = f.v_int,
    uint = f.v_uint,
    float = f.v_float,
    str = f.v_str,
    bin = f.v_bin,
    array = f.v_array,
    map = f.v_map,
}

-- Keys that have their own fields, by the field of their map: the required type, the minimum of an int, and the maximum
-- length of a str (its minimum is one character).
local KEYS = {
    [f.meta] = {
        deadline_ms = { field = f.deadline_ms, type = "int" },
        idempotency_key = { field = f.idempotency_key, type = "str", most = 64 },
        traceparent = { field = f.traceparent, type = "str", any = true }, -- one of another type is ignored
        pending = { field = f.pending, type = "str", any = true }, -- a client may ignore it
        credit = { field = f.credit, type = "array", any = true }, -- checked with its OPEN
        resume = { field = f.resume, type = "map" },
    },
    [f.accepted] = {},
    [f.goaway] = {
        reason = { field = f.reason, type = "str" },
        retry_after_ms = { field = f.retry_after_ms, type = "int", least = 0 },
    },
    [f.welcome] = {
        server = { field = f.server, type = "str" },
        versions = { field = f.versions, type = "array" },
        max_frame = { field = f.max_frame, type = "int", least = MIN_LENGTH },
        max_streams = { field = f.max_streams, type = "int", least = 1 },
        idle_timeout_ms = { field = f.idle_timeout_ms, type = "int", least = 0 },
        tolerance_ms = { field = f.tolerance_ms, type = "int", least = 0 },
        sts = { field = f.sts, type = "map" },
        streams = { field = f.streams, type = "map", optional = true },
        calls = { field = f.calls, type = "map", optional = true },
    },
    [f.streams] = {
        max_open = { field = f.max_open, type = "int", least = 0 },
        max_item = { field = f.max_item, type = "int", least = MIN_LENGTH },
        durable = { field = f.durable, type = "bool", optional = true },
    },
    [f.calls] = {
        max = { field = f.max_calls, type = "int", least = 0 },
    },
    [f.sts] = {
        max_age = { field = f.max_age, type = "int", least = 0 },
        include_subdomains = { field = f.include_subdomains, type = "bool" },
    },
}

local function fault(name, text)
    return ProtoExpert.new("zcp.expert." .. name, text, expert.group.PROTOCOL, expert.severity.ERROR)
end

local function remark(name, text, severity)
    return ProtoExpert.new("zcp.expert." .. name, text, expert.group.SEQUENCE, severity)
end

local e = {
    length = fault("length", "Invalid length"),
    version = fault("version", "Unknown version"),
    kind = fault("kind", "Unknown kind"),
    sender = fault("sender", "Kind from the wrong side"),
    flags = fault("flags", "Flags are set"),
    stream = fault("stream", "Stream not allowed for this kind"),
    in_flight = fault("in_flight", "Stream is already in flight"),
    replayed = fault("replayed", "Wrong salt, or counter that did not increase"),
    greeting = fault("greeting", "The first frame, and no other, must be WELCOME"),
    body = fault("body", "Body on a kind that has none"),
    msgpack = fault("msgpack", "Body that cannot be decoded"),
    trailing = fault("trailing", "Bytes after the value of the body"),
    form = fault("form", "Body with the wrong form for its kind"),
    after_fault = remark("after_fault", "Bytes after a fault: the start of the next frame is unknown", expert.severity.WARN),
    stale = remark("stale", "Timestamp beyond the tolerance", expert.severity.WARN),
    ended = fault("ended", "ITEM or END after END"),
    unopened = fault("unopened", "ITEM, CREDIT or ACCEPTED on the stream of a REQUEST"),
    unasked = remark("unasked", "Answer on a stream that is not in flight", expert.severity.WARN),
    fatal = remark("fatal", "Error that ends the connection", expert.severity.WARN),
    failed = remark("failed", "Call that failed", expert.severity.NOTE),
    cut_short = remark("cut_short", "More values than are shown", expert.severity.NOTE),
}

zcp.experts = e

-- --- secrets -------------------------------------------------------------------------------------------------

-- Params of session and device methods that are not secret. All others may be: a server can add its own schemes to
-- session.open.
local OPEN_PARAMS = {
    scheme = true,
    user = true,
    device = true,
    client = true,
    name = true,
    public_key = true,
    id = true,
    all = true,
    methods = true,
    max = true,
}

local SECRET_KEYS = { token = true, refresh_token = true, key = true, code = true, signature = true }

local function is_of_sessions(method)
    return method:find("^session%.") ~= nil or method:find("^device%.") ~= nil
end

-- Return which keys of a method's params and result are secret; all possible ones if the method is not known.
local function secret_in_params(method)
    if method == nil then
        return function(key)
            return SECRET_KEYS[key]
        end
    end
    return is_of_sessions(method) and function(key)
        return not OPEN_PARAMS[key]
    end
end

local function secret_in_result(method)
    return (method == nil or is_of_sessions(method)) and function(key)
        return SECRET_KEYS[key]
    end
end

-- --- state of a capture --------------------------------------------------------------------------------------

local conversations -- by the two ends
local calls -- what was found, by packet and by the number of the call for it
local numbers, last_number -- of tokens, in the order in which they come

local function forget()
    conversations, calls, numbers, last_number = {}, {}, {}, 0
end

forget()
zcp.init = forget -- before each capture, and before packets are dissected again

local function number_of(token)
    if not numbers[token] then
        last_number = last_number + 1
        numbers[token] = last_number
    end
    return numbers[token]
end

local function ends_of(pinfo)
    return tostring(pinfo.src) .. " " .. pinfo.src_port, tostring(pinfo.dst) .. " " .. pinfo.dst_port
end

local function key_of(source, destination)
    return source < destination and source .. "|" .. destination or destination .. "|" .. source
end

local function begins_with_welcome(chunk)
    if #chunk < HEADER then
        return false
    end
    local length, version, kind, flags, stream, counter, _ = string.unpack(">I4BBI2I4xxxxxxxxxxxxxxxxi8", chunk)
    return length >= MIN_LENGTH and version == 1 and kind == WELCOME and flags == 0 and stream == 0 and counter == 0
end

-- Return the conversation of a packet. A WELCOME with a new salt at the beginning of a chunk starts another connection
-- between the same two ends: ports are reused.
local function conversation_of(source, destination, chunk)
    local key = key_of(source, destination)
    local known = conversations[key]
    if not known or known.salt and begins_with_welcome(chunk) and chunk:sub(21, 28) ~= known.salt then
        known = { flows = {}, in_flight = {}, calls = {}, pings = {}, announced = {} }
        conversations[key] = known
    end
    return known
end

-- --- msgpack -------------------------------------------------------------------------------------------------

-- Return the value of a body as a node {at, length, type, value, items}, and its fault as {at, text}. `at` counts from 0.
-- A body that cannot be decoded has the nodes before the fault. Maps have pairs {key, value} in `items`; `left_out` is
-- the number of items that were checked and dropped.
local function decode(body)
    local size, kept, wrong = #body, 0, nil
    local value

    local function fail(at, text)
        wrong = wrong or { at = at, text = text }
    end

    -- Return the number after the first byte, or nil.
    local function read(format, at, width)
        if at + width > size then
            return fail(at, "the body ends within a value")
        end
        return (string.unpack(format, body, at + 1))
    end

    local function items(node, count, depth, is_map)
        local at = node.at + node.head
        if depth > MAX_DEPTH then
            return fail(node.at, "nested more than " .. MAX_DEPTH .. " deep")
        end
        if count * (is_map and 2 or 1) > size - at then
            return fail(node.at, "declares " .. count .. " items, which are not there")
        end
        node.items, node.left_out, node.count = {}, 0, count
        for _ = 1, count do
            local key, item
            local keep = kept < MAX_SHOWN -- before what is in it, which would use up all
            kept = keep and kept + 1 or kept
            if is_map then
                key = value(at, depth + 1)
                if wrong then
                    return nil
                elseif key.type ~= "str" then
                    return fail(at, "a key is not a str")
                end
                at = at + key.length
            end
            item = value(at, depth + 1)
            if item and keep then
                node.items[#node.items + 1] = is_map and { key = key, value = item } or { value = item }
            else
                node.left_out = node.left_out + 1
            end
            if wrong then
                return nil
            end
            at = at + item.length
        end
        node.length = at - node.at
    end

    local function text(node, width)
        local at = node.at + node.head
        if width > size - at then
            return fail(node.at, "declares " .. width .. " bytes, which are not there")
        end
        node.length = node.head + width
        node.value = body:sub(at + 1, at + width)
        if node.type == "str" and not utf8.len(node.value) then
            node.type = "bin" -- shown as what it is
            return fail(node.at, "a str is not UTF-8")
        end
    end

    local FORMATS = { [1] = ">I1", [2] = ">I2", [4] = ">I4", [8] = ">I8" }

    -- Lengths and counts after the first byte.
    local function counted(node, width, depth)
        local count = read(FORMATS[width], node.at + 1, width)
        if not count then
            return
        end
        node.head = 1 + width
        if node.type == "str" or node.type == "bin" then
            text(node, count)
        else
            items(node, count, depth, node.type == "map")
        end
    end

    local function fixed(node, kind, format, width)
        node.type, node.value = kind, read(format, node.at + 1, width)
        node.length = node.value ~= nil and 1 + width or nil
    end

    function value(at, depth)
        if at >= size then
            return fail(at, "the body ends before a value")
        end
        local first = body:byte(at + 1)
        local node = { at = at, head = 1 }
        if first <= 0x7f then
            node.type, node.value, node.length = "int", first, 1
        elseif first <= 0x8f then
            node.type = "map"
            items(node, first - 0x80, depth, true)
        elseif first <= 0x9f then
            node.type = "array"
            items(node, first - 0x90, depth, false)
        elseif first <= 0xbf then
            node.type = "str"
            text(node, first - 0xa0)
        elseif first == 0xc0 then
            node.type, node.length = "nil", 1
        elseif first == 0xc1 then
            return fail(at, "0xc1 begins no value")
        elseif first <= 0xc3 then
            node.type, node.value, node.length = "bool", first == 0xc3, 1
        elseif first <= 0xc6 then
            node.type = "bin"
            counted(node, 1 << (first - 0xc4), depth)
        elseif first <= 0xc9 or (first >= 0xd4 and first <= 0xd8) then
            return fail(at, "ext types are not allowed")
        elseif first <= 0xcb then
            fixed(node, "float", first == 0xca and ">f" or ">d", first == 0xca and 4 or 8)
        elseif first <= 0xcf then
            local width = 1 << (first - 0xcc)
            fixed(node, "int", FORMATS[width], width)
            if width == 8 and node.value and node.value < 0 then
                node.type = "uint" -- Lua has signed integers alone
            end
        elseif first <= 0xd3 then
            local width = 1 << (first - 0xd0)
            fixed(node, "int", ">i" .. width, width)
        elseif first <= 0xdb then
            node.type = "str"
            counted(node, 1 << (first - 0xd9), depth)
        elseif first <= 0xdf then
            node.type = first <= 0xdd and "array" or "map"
            counted(node, first % 2 == 0 and 2 or 4, depth)
        else
            node.type, node.value, node.length = "int", first - 0x100, 1
        end
        if not node.length then
            node.length, node.broken = size - at, true -- what there is of it
        end
        -- A container with a fault is shown up to the fault, any other value not at all.
        return (not wrong or node.items or node.value) and node or nil
    end

    local root = value(0, 1)
    if not wrong and root.length < size then
        return root, nil, root.length
    end
    return root, wrong
end

-- Return the method of a REQUEST, or nil. It is at the beginning, so the rest need not be decoded.
local function method_of(raw)
    local root = decode(raw:sub(HEADER + 1, HEADER + 2 * MAX_METHOD))
    local item = root and root.type == "array" and root.items[1]
    return item and item.value.type == "str" and item.value.value or nil
end

-- --- splitting the stream into frames ------------------------------------------------------------------------

-- Lua has only signed integers, and prints them with their sign.
local function unsigned(value)
    return tostring(UInt64.new(value & 0xffffffff, value >> 32))
end

local function as_float(value)
    return value >= 0 and value + 0.0 or (value >> 1) * 2.0
end

-- Judge a frame by the state of the conversation: its request, the streams in flight, replays. This is done once per
-- frame, because packets are dissected again in any order.
local function judge(conversation, flow, source, pinfo, raw)
    local length, version, kind, flags, stream, timestamp, salt, counter, token =
        string.unpack(">I4BBI2I4i8c8i8c32", raw)
    local frame = { kind = kind, stream = stream, packet = pinfo.number, time = pinfo.rel_ts, faults = {} }
    local rule = KINDS[kind]
    local function say(what, text)
        frame.faults[#frame.faults + 1] = { what, text }
    end
    if token ~= NO_TOKEN then
        number_of(token)
    end
    if rule and rule.sender == "server" and not conversation.server then
        conversation.server = source
    elseif rule and rule.sender == "client" and not conversation.client then
        conversation.client = source
    end
    if conversation.server then
        frame.sender = conversation.server == source and "server" or "client"
    elseif conversation.client then
        frame.sender = conversation.client == source and "client" or "server"
    end
    if version ~= 1 or not rule then
        return frame
    end
    if rule.sender and frame.sender and rule.sender ~= frame.sender then
        say(e.sender, rule.name .. " is sent by the " .. rule.sender .. " alone")
        return frame
    end
    if kind == WELCOME then
        if conversation.salt then
            say(e.greeting, "a second WELCOME")
            return frame
        elseif counter ~= 0 then
            say(e.greeting, "the counter of WELCOME is 0")
        end
        conversation.salt = salt
        conversation.clock = { timestamp = timestamp, at = pinfo.abs_ts }
        local root = decode(raw:sub(HEADER + 1))
        for _, item in ipairs(root and root.type == "map" and root.items or {}) do
            if item.key.value == "tolerance_ms" and item.value.type == "int" then
                conversation.tolerance = item.value.value
            end
            if item.key.value == "streams" or item.key.value == "calls" then
                conversation.announced[item.key.value] = true
                for _, each in ipairs(item.key.value == "streams" and item.value.items or {}) do
                    if each.key and each.key.value == "durable" and each.value.value == true then
                        conversation.announced["durable streams"] = true
                    end
                end
            end
        end
        return frame
    end
    if not conversation.salt then
        say(e.greeting, "no WELCOME came before this frame")
    elseif salt ~= conversation.salt then
        say(e.replayed, "the salt is not that of this connection's WELCOME")
    elseif not math.ult(flow.counter, counter) then
        say(e.replayed, string.format("the counter is not above %s", unsigned(flow.counter)))
    else
        flow.counter = counter
    end
    if conversation.clock and conversation.tolerance then
        -- The server's clock when this header was captured. Both are in milliseconds; floats are precise enough.
        local passed = math.floor((flow.arrived - conversation.clock.at) * 1000 + 0.5)
        local off = as_float(timestamp) - (as_float(conversation.clock.timestamp) + passed)
        if math.abs(off) > conversation.tolerance then
            say(e.stale, string.format("the timestamp is off by about %.0f ms", off))
            frame.stale = true
        end
    end
    if rule.part_of and conversation.salt and not conversation.announced[rule.part_of] then
        say(e.kind, "WELCOME has not announced " .. rule.part_of)
    end
    if kind == REQUEST or kind == OPEN then
        local other = conversation.in_flight[stream]
        if other and not other.stale then -- a stale one is refused at once, and its stream is free again
            say(e.in_flight, "stream " .. stream .. " is in flight since packet " .. other.packet)
        end
        frame.method = method_of(raw)
        conversation.in_flight[stream] = frame
    elseif kind == CANCEL then
        frame.request = conversation.in_flight[stream]
    elseif kind == ITEM or kind == END or kind == CREDIT or kind == ACCEPTED then
        local opened = conversation.in_flight[stream]
        frame.request = opened
        if opened and kind == ACCEPTED then
            opened.accepted = true
        end
        if opened and opened.kind ~= OPEN then
            say(e.unopened, "stream " .. stream .. " began with " .. KIND_NAMES[opened.kind])
        elseif opened and frame.sender == "client" and kind ~= CREDIT then
            if opened.ended then
                say(e.ended, "the client has sent END on stream " .. stream)
            end
            opened.ended = opened.ended or kind == END
        elseif not opened and frame.sender == "server" and conversation.salt then
            say(e.unasked, "nothing is in flight on stream " .. stream)
        end
    elseif kind == CALL then
        local other = conversation.calls[stream]
        if other then
            say(e.in_flight, "call " .. stream .. " is in flight since packet " .. other.packet)
        end
        frame.method = method_of(raw)
        conversation.calls[stream] = frame
    elseif kind == WITHDRAW then
        frame.request = conversation.calls[stream]
    elseif kind == RESULT or kind == FAILURE then
        frame.request = conversation.calls[stream]
        if frame.request then
            frame.request.answer, frame.answers = frame, true
            conversation.calls[stream] = nil
        elseif conversation.salt then
            say(e.unasked, "no call " .. stream .. " is in flight")
        end
    elseif (kind == RESPONSE or kind == ERROR) and stream ~= 0 then
        frame.request = conversation.in_flight[stream]
        if frame.request then
            frame.request.answer, frame.answers = frame, true
            conversation.in_flight[stream] = nil
        elseif conversation.salt then
            say(e.unasked, "nothing is in flight on stream " .. stream)
        end
    elseif kind == PING then
        local waiting = conversation.pings[source] or { first = 1, last = 0 }
        conversation.pings[source] = waiting
        waiting.last = waiting.last + 1
        waiting[waiting.last] = frame
    elseif kind == PONG then
        for side, waiting in pairs(conversation.pings) do
            if side ~= source and waiting.first <= waiting.last then
                frame.request, frame.answers = waiting[waiting.first], true
                frame.request.answer = frame
                waiting[waiting.first] = nil
                waiting.first = waiting.first + 1
            end
        end
    end
    return frame
end

-- Split a chunk into frames and pieces of frames. A piece is copied once; a frame is reassembled when its last byte has
-- arrived, and only if it is not complete in this chunk.
local function take(chunk, pinfo)
    local source, destination = ends_of(pinfo)
    local conversation = conversation_of(source, destination, chunk)
    local flow = conversation.flows[source]
    if not flow then
        flow = { pieces = {}, have = 0, counter = 0 } -- the first counter after WELCOME is 1 or more
        conversation.flows[source] = flow
    end
    local found, at, limit = { size = #chunk }, 0, zcp.prefs.max_length
    while at < #chunk do
        local part = { at = at }
        found[#found + 1] = part
        if flow.broken then
            part.size, part.after_fault = #chunk - at, flow.broken
            return found
        end
        if flow.have == 0 then
            flow.started = { packet = pinfo.number }
        end
        local whole = flow.have == 0
        local function collect(wanted)
            local got = math.min(wanted - flow.have, #chunk - at)
            flow.pieces[#flow.pieces + 1] = chunk:sub(at + 1, at + got)
            flow.have, at = flow.have + got, at + got
        end
        if flow.have < 4 then
            collect(4)
        end
        if flow.have >= 4 and not flow.wanted then
            local length = string.unpack(">I4", table.concat(flow.pieces))
            if length < MIN_LENGTH or length > limit then
                collect(HEADER) -- for the other fields of the header, as far as they are there
                part.bad_length, part.raw, flow.broken = length, table.concat(flow.pieces), pinfo.number
                part.size = at - part.at
                goto next
            end
            flow.wanted = 4 + length
        end
        if flow.wanted then
            collect(flow.wanted)
        end
        if flow.have >= HEADER and not flow.arrived then
            flow.arrived = pinfo.abs_ts
        end
        part.size, part.started = at - part.at, flow.started
        if flow.wanted and flow.have == flow.wanted then
            local raw = table.concat(flow.pieces)
            part.frame = judge(conversation, flow, source, pinfo, raw)
            part.raw = not whole and raw or nil
            flow.started.complete_in = pinfo.number
            flow.pieces, flow.have, flow.wanted, flow.arrived = {}, 0, nil, nil
        else
            part.have, part.wanted = flow.have, flow.wanted
        end
        ::next::
    end
    return found
end

-- --- the tree ------------------------------------------------------------------------------------------------

local function plural(count, what)
    return count .. " " .. what .. (count == 1 and "" or "s")
end

local function generated(item)
    item:set_generated(true)
    return item
end

-- Return the text without control characters.
local function printable(text)
    return (text:gsub("%c", "."))
end

-- Return a short form of a value, with secrets masked.
local function preview(node, secret, room)
    local kind = node.type
    if kind == "nil" then
        return "nil"
    elseif kind == "str" then
        local last = #node.value > room and utf8.offset(node.value:sub(1, room + 4), 0, room + 1)
        return '"' .. printable(last and node.value:sub(1, last - 1) .. "…" or node.value) .. '"'
    elseif kind == "bin" then
        return plural(#node.value, "byte")
    elseif kind == "uint" then
        return unsigned(node.value)
    elseif kind == "float" then
        return string.format("%.17g", node.value)
    elseif not node.items then
        return tostring(node.value)
    end
    local parts, used = {}, 0
    for _, item in ipairs(node.items) do
        local key = item.key and item.key.value
        local masked = key and secret and secret(key) and item.value.type ~= "nil"
        local part = masked and "masked" or preview(item.value, secret, math.max(room - used, 8))
        part = key and printable(key) .. ": " .. part or part
        used = used + #part + 2
        if used > room then
            parts[#parts + 1] = "…"
            break
        end
        parts[#parts + 1] = part
    end
    local inside = table.concat(parts, ", ")
    return kind == "array" and "[" .. inside .. "]" or "{" .. inside .. "}"
end

-- Return whether a value contains a secret. No part of such a value is marked as bytes of the packet, because PDML shows
-- the bytes of each field.
local function has_secret(node, secret)
    if not secret or not node.items then
        return false
    end
    for _, item in ipairs(node.items) do
        local key = item.key and item.key.value
        if key and secret(key) or has_secret(item.value, secret) then
            return true
        end
    end
    return node.left_out > 0 or node.broken -- for all that is known
end

local function halves(class, value)
    return class.new(value & 0xffffffff, value >> 32)
end

local MASKED = {} -- in place of a function that returns which keys are secret: the whole value is

-- Add a value and its items. `bytes` returns ranges of the body; `field` is the value's own field, or nil; `name` is its
-- label if it has none; `secret` returns which keys are secret.
local function add_value(bytes, tree, node, field, name, path, secret)
    local kind, item = node.type, nil
    if secret == MASKED and kind ~= "nil" then
        local text = (kind == "bin" or kind == "str") and plural(#node.value, "byte") or kind
        if (name == "token" or name == "refresh_token") and kind == "bin" and #node.value == 32 then
            text = "#" .. number_of(node.value) .. ", " .. text
        end
        item = tree:add(f.v_masked, bytes(node.at, 0), text .. ", masked")
        item:set_text(name .. ": " .. text .. ", masked")
    elseif node.items then
        local known = KEYS[field]
        item = tree:add(field or FIELD_OF_TYPE[kind], bytes(node.at, has_secret(node, secret) and 0 or node.length))
        item:set_text(name .. ": " .. preview(node, secret, MAX_PREVIEW))
        for index, each in ipairs(node.items) do
            local key = each.key and each.key.value
            local rule = key and known and known[key]
            local label = key and printable(key) or "[" .. index - 1 .. "]"
            local deeper = key and path .. "." .. label or path .. label
            local within = secret
            if key and secret and secret(key) then
                within = MASKED
            end
            local right = rule and rule.type == each.value.type
            local large = rule and rule.type == "int" and each.value.type == "uint" -- right, but not for the field
            local child = add_value(bytes, item, each.value, right and rule.field or nil, label, deeper, within)
            if rule and not (right or large or rule.any or field == f.meta and each.value.type == "nil") then
                child:add_proto_expert_info(e.form, label .. " must be " .. rule.type)
            elseif right and rule.least and each.value.value < rule.least then
                child:add_proto_expert_info(e.form, label .. " must be " .. rule.least .. " or more")
            elseif right and rule.most and (each.value.value == "" or utf8.len(each.value.value) > rule.most) then
                child:add_proto_expert_info(e.form, label .. " must have 1 to " .. rule.most .. " characters")
            end
        end
        if node.left_out > 0 and #node.items + node.left_out == node.count then
            item:add_proto_expert_info(e.cut_short, plural(node.left_out, "more value") .. " not shown")
        end
        return item
    else
        local range, typed = bytes(node.at, node.length), field or FIELD_OF_TYPE[kind]
        if kind == "nil" then
            item = tree:add(typed, range)
        elseif kind == "int" then
            item = tree:add(typed, range, halves(Int64, node.value))
        elseif kind == "uint" then
            item = tree:add(typed, range, halves(UInt64, node.value))
        elseif kind == "bin" then
            item = tree:add(typed, bytes(node.at + node.head, #node.value))
        elseif kind == "str" then
            item = tree:add(typed, range, (node.value:gsub("\0", "␀"))) -- Wireshark would end the text there
        else
            item = tree:add(typed, range, node.value)
        end
        if not field then
            item:set_text(name .. ": " .. preview(node, nil, 4 * MAX_PREVIEW))
        end
    end
    local where = tree:add(f.path, bytes(node.at, 0), path)
    where:set_hidden(true)
    return item
end

-- Check that a map has all required keys.
local function check_complete(item, node, field)
    local missing, there = {}, {}
    for _, each in ipairs(node.items) do
        there[each.key.value] = each.value
    end
    for key, rule in pairs(KEYS[field]) do
        if not there[key] and not rule.optional then
            missing[#missing + 1] = key
        end
    end
    table.sort(missing)
    if #missing > 0 then
        item:add_proto_expert_info(e.form, "without " .. table.concat(missing, ", "))
    end
    return there
end

-- The elements of the array of each kind: the field, its label and the types that it may have.
local ELEMENTS = {
    [REQUEST] = {
        { f.method, "Method", { str = true } },
        { f.params, "Params", { map = true, ["nil"] = true } },
        { f.meta, "Meta", { map = true } },
        least = 2,
        form = "[method, params] or [method, params, meta]",
    },
    [ERROR] = {
        { f.code, "Code", { int = true, uint = true } },
        { f.message, "Message", { str = true } },
        { f.details, "Details", { map = true, ["nil"] = true } },
        least = 2,
        form = "[code, message] or [code, message, details]",
    },
    [EVENT] = {
        { f.event_name, "Name", { str = true } },
        { f.event_data, "Data" },
        least = 2,
        form = "[name, data]",
    },
    [CREDIT] = {
        { f.credit_items, "Items", { int = true } },
        { f.credit_bytes, "Bytes", { int = true } },
        { f.credit_taken, "Taken", { int = true } },
        least = 2,
        form = "[items, bytes] or [items, bytes, taken]",
    },
}

ELEMENTS[OPEN] = ELEMENTS[REQUEST]
ELEMENTS[FAILURE] = ELEMENTS[ERROR]
ELEMENTS[CALL] = {
    ELEMENTS[REQUEST][1],
    ELEMENTS[REQUEST][2],
    ELEMENTS[REQUEST][3],
    least = 3,
    form = "[method, params, meta]",
}

local PATHS = {
    [f.params] = "params",
    [f.meta] = "meta",
    [f.details] = "details",
    [f.event_data] = "data",
    [f.method] = "method",
    [f.code] = "code",
    [f.message] = "message",
    [f.event_name] = "name",
    [f.credit_items] = "items",
    [f.credit_bytes] = "bytes",
    [f.credit_taken] = "taken",
}

local WITH_METHOD = { [REQUEST] = true, [OPEN] = true, [CALL] = true }

-- Return which keys of a frame's body are secret, or MASKED; nil for none.
local function secrets_of(frame, element, node)
    if zcp.prefs.show_secrets then
        return nil
    elseif frame.kind == RESPONSE then
        return secret_in_result(frame.request and frame.request.method) or nil
    elseif not WITH_METHOD[frame.kind] or element == f.method and node.type == "str" then
        return nil
    elseif element == f.meta and node.type == "map" then
        return secret_in_params(nil)
    end
    local secret = secret_in_params(frame.method)
    -- Params of the wrong type have no keys that show which part of them is secret.
    return secret and (element == f.params and node.type == "map" and secret or MASKED) or nil
end

local function is_total(node)
    return node.type == "int" and node.value >= 0 and node.value <= MAX_CREDIT
end

-- Check what the meta of an OPEN must and must not have.
local function check_meta_of_open(item, node)
    for _, each in ipairs(node.items) do
        local value = each.value
        if each.key.value == "idempotency_key" and value.type ~= "nil" then
            item:add_proto_expert_info(e.form, "a stream has no idempotency_key")
        elseif each.key.value == "credit" and value.type ~= "nil" then
            local pair = value.type == "array" and value.count == 2 and value.items
            if not (pair and #pair == 2 and is_total(pair[1].value) and is_total(pair[2].value)) then
                item:add_proto_expert_info(e.form, "credit must be [items, bytes]")
            end
        end
    end
end

-- Add the body of a frame of a known kind. Return its text for the Info column.
local function add_body(frame, bytes, tree, body)
    local root, wrong, trailing = decode(body)
    local item = tree:add(f.body, bytes(0, 0))
    item:set_text("Body: " .. plural(#body, "byte"))
    local info
    if root then
        local form = ELEMENTS[frame.kind]
        if form then
            local right = root.type == "array" and root.count >= form.least and root.count <= #form
            if not right then
                item:add_proto_expert_info(e.form, "must be " .. form.form)
                add_value(bytes, item, root, nil, "value", "value", secrets_of(frame, nil, root))
            end
            for index, each in ipairs(right and root.items or {}) do
                local field, label, types = table.unpack(form[index])
                local node, fits = each.value, not types or types[each.value.type]
                local path = PATHS[field]
                -- A value of the wrong type for the field of its element is shown as a plain value.
                local plain = types and node.type ~= "nil" and node.type ~= "uint"
                local own = fits and (node.items or plain) and field or nil
                local added = add_value(bytes, item, node, own, label, path, secrets_of(frame, field, node))
                if not fits then
                    added:add_proto_expert_info(e.form, label:lower() .. " must not be " .. node.type)
                end
                if field == f.meta and fits and frame.kind == OPEN then
                    check_meta_of_open(added, node)
                elseif frame.kind == CREDIT and fits and not is_total(node) then
                    added:add_proto_expert_info(e.form, label:lower() .. " must be from 0 to 2^53 - 1")
                end
                if field == f.credit_taken and not (frame.request and frame.request.accepted) then
                    added:add_proto_expert_info(e.form, "taken on a stream without ACCEPTED")
                end
                if field == f.method and fits then
                    info = printable(node.value:sub(1, MAX_METHOD))
                    if #node.value > MAX_METHOD or not node.value:find("^[a-z0-9_.]+$") then
                        added:add_proto_expert_info(e.form, "not a valid method name")
                    end
                elseif field == f.event_name and fits then
                    info = printable(node.value:sub(1, MAX_METHOD))
                elseif field == f.code and fits then
                    info = CODES[node.value] or preview(node, nil, MAX_PREVIEW)
                    local fatal = frame.stream == 0
                    added:add_proto_expert_info(fatal and e.fatal or e.failed, info)
                end
            end
        elseif frame.kind == RESPONSE or frame.kind == RESULT then
            local own = root.items and f.result or nil
            add_value(bytes, item, root, own, "Result", "result", secrets_of(frame, f.result, root))
        elseif frame.kind == ITEM then
            add_value(bytes, item, root, root.items and f.item or nil, "Item", "item")
        else
            local field = frame.kind == WELCOME and f.welcome or frame.kind == ACCEPTED and f.accepted or f.goaway
            local is_map = root.type == "map"
            local name = KIND_NAMES[frame.kind]
            local added = add_value(bytes, item, root, is_map and field or nil, name, name:lower())
            if not is_map then
                added:add_proto_expert_info(e.form, "must be a map")
            elseif not wrong then
                local there = check_complete(added, root, field)
                for key, of in pairs({ sts = f.sts, streams = f.streams, calls = f.calls }) do
                    if there[key] and there[key].type == "map" then
                        check_complete(added, there[key], of)
                    end
                end
                if there.versions and there.versions.type == "array" then
                    local speaks = false
                    for _, each in ipairs(there.versions.items) do
                        speaks = speaks or each.value.type == "int" and each.value.value == 1
                    end
                    if not speaks then
                        added:add_proto_expert_info(e.form, "version 1 is not among the versions")
                    end
                end
                local reason = there.reason
                info = reason and reason.type == "str" and printable(reason.value:sub(1, MAX_METHOD)) or nil
            end
        end
    end
    if wrong then
        item:add_proto_expert_info(e.msgpack, wrong.text .. " (byte " .. wrong.at .. " of the body)")
    elseif trailing then
        item:add_proto_expert_info(e.trailing, plural(#body - trailing, "byte") .. " after the value")
    end
    return info
end

-- Add the time of a header. Any 64 bits are possible; a time after the year 9999 is shown as a number only.
local function time_of(milliseconds)
    if milliseconds < 0 or milliseconds > 253402300799999 then
        return nil
    end
    return NSTime.new(milliseconds // 1000, milliseconds % 1000 * 1000000)
end

-- Add the header's fields that have arrived. Return the items that faults are attached to.
local function add_header(bytes, tree, raw)
    local items, size = {}, #raw
    local function add(name, at, width, value)
        if size >= at + width then
            items[name] = value and tree:add(f[name], bytes(at, width), value) or tree:add(f[name], bytes(at, width))
        end
    end
    add("length", 0, 4)
    add("version", 4, 1)
    add("kind", 5, 1)
    add("flags", 6, 2)
    add("stream", 8, 4)
    if size >= 20 then
        local milliseconds = string.unpack(">i8", raw, 13)
        local time = time_of(milliseconds)
        if time then
            add("timestamp", 12, 8, time)
        end
        items.timestamp_ms = (items.timestamp or tree):add(f.timestamp_ms, bytes(12, 8))
    end
    add("salt", 20, 8)
    add("counter", 28, 8)
    if size >= HEADER then
        local token = raw:sub(37, HEADER)
        if token == NO_TOKEN then
            items.token = tree:add(f.token, bytes(36, 32), "none")
        elseif zcp.prefs.show_secrets then
            items.token = tree:add(f.token, bytes(36, 32), (token:gsub(".", function(each)
                return string.format("%02x", each:byte())
            end)))
        else
            items.token = tree:add(f.token, bytes(36, 0), "#" .. number_of(token) .. ", 32 bytes, masked")
        end
        if token ~= NO_TOKEN then
            generated(items.token:add(f.token_number, bytes(36, 0), number_of(token)))
        end
    end
    return items
end

local function add_packet(tree, field, bytes, number)
    if number then
        generated(tree:add(field, bytes(0, 0), number))
    end
end

-- Add the packet of the frame that belongs to this one, and the time between them.
local function add_links(tree, bytes, frame)
    if frame.sender then
        generated(tree:add(f.sender, bytes(0, 0), frame.sender))
    end
    if frame.request then
        add_packet(tree, f.request_in, bytes, frame.request.packet)
    end
    if frame.answer then
        add_packet(tree, f.answer_in, bytes, frame.answer.packet)
    end
    if frame.answers then
        local took = math.max(frame.time - frame.request.time, 0)
        local seconds = math.floor(took)
        local rest = math.min(math.floor((took - seconds) * 1e9 + 0.5), 999999999)
        generated(tree:add(f.time, bytes(0, 0), NSTime.new(seconds, rest)))
    end
end

-- Add the faults of the header alone.
local function add_header_faults(items, raw, frame)
    local _, version, kind, flags, stream = string.unpack(">I4BBI2I4", raw)
    local rule = KINDS[kind]
    if version ~= 1 then
        items.version:add_proto_expert_info(e.version, "version " .. version .. " instead of 1")
    end
    if not rule then
        local why = kind >= 0x10 and kind <= 0x1f and "reserved" or "unknown"
        items.kind:add_proto_expert_info(e.kind, string.format("kind 0x%02x is %s", kind, why))
    end
    if flags ~= 0 then
        items.flags:add_proto_expert_info(e.flags)
    end
    if rule and rule.stream == "zero" and stream ~= 0 then
        items.stream:add_proto_expert_info(e.stream, rule.name .. " concerns the connection: stream 0")
    elseif rule and rule.stream == "number" and stream == 0 then
        items.stream:add_proto_expert_info(e.stream, rule.name .. " needs the stream of a request")
    end
    for _, each in ipairs(frame.faults) do
        local at = items.kind
        if each[1] == e.replayed then
            at = items.counter
        elseif each[1] == e.stale then
            at = items.timestamp_ms
        elseif each[1] ~= e.kind and each[1] ~= e.sender and each[1] ~= e.greeting then
            at = items.stream
        end
        at:add_proto_expert_info(each[1], each[2])
    end
    return version == 1 and rule
end

-- Add a whole frame. Return its text for the Info column.
local function show_frame(frame, bytes, tree, raw)
    local name = KIND_NAMES[frame.kind] or string.format("kind 0x%02x", frame.kind)
    local top = tree:add(zcp, bytes(0, #raw))
    local items = add_header(bytes, top, raw)
    local rule = add_header_faults(items, raw, frame)
    add_links(top, bytes, frame)
    local said
    if #raw > HEADER then
        local body = raw:sub(HEADER + 1)
        if rule and rule.body then
            said = add_body(frame, function(at, width)
                return bytes(HEADER + at, width)
            end, top, body)
        else
            local item = top:add(f.body, bytes(HEADER, 0))
            item:set_text("Body: " .. plural(#body, "byte") .. ", not decoded")
            if rule then
                item:add_proto_expert_info(e.body, rule.name .. " has no body")
            end
        end
    elseif rule and rule.body then
        items.length:add_proto_expert_info(e.msgpack, rule.name .. " without a body")
    end
    if (frame.kind == RESPONSE or frame.kind == RESULT) and frame.request and frame.request.method then
        said = printable(frame.request.method:sub(1, MAX_METHOD))
    end
    local info = name
    if frame.stream ~= 0 then
        info = info .. " " .. frame.stream
    end
    info = said and info .. " " .. said or info
    top:set_text("ZCP/1, " .. info)
    return info
end

-- Add an invalid length, and the part of the header that has arrived.
local function show_bad_length(part, bytes, tree)
    local top = tree:add(zcp, bytes(0, #part.raw))
    top:set_text("ZCP/1, a frame with a length that cannot be")
    local items = add_header(bytes, top, part.raw)
    local text = part.bad_length < MIN_LENGTH and "below " .. MIN_LENGTH
        or "above " .. zcp.prefs.max_length .. ", which can be set"
    items.length:add_proto_expert_info(e.length, "length " .. part.bad_length .. " is " .. text)
    return "length " .. part.bad_length
end

local function show_part(part, tvb, tree)
    local function here(at, width)
        return tvb:range(part.at + at, width)
    end
    local function apart()
        local together = ByteArray.new(part.raw, true):tvb("ZCP/1 frame")
        return function(at, width)
            return together:range(at, width)
        end
    end
    if part.frame then
        local bytes = part.raw and apart() or here
        return show_frame(part.frame, bytes, tree, part.raw or tvb:raw(part.at, part.size))
    elseif part.bad_length then
        return show_bad_length(part, #part.raw == part.size and here or apart(), tree)
    end
    local item = tree:add(zcp, here(0, part.size))
    if part.after_fault then
        item:set_text("ZCP/1, " .. plural(part.size, "byte") .. " that mean nothing any more")
        item:add_proto_expert_info(e.after_fault, "the fault is in packet " .. part.after_fault)
        return plural(part.size, "byte") .. " after a fault"
    end
    local of = part.wanted and plural(part.wanted, "byte") or "a frame whose length is not there yet"
    local info = "part of a frame, " .. part.have .. " of " .. of
    item:set_text("ZCP/1, " .. info)
    add_packet(item, f.begins_in, here, part.started.packet ~= part.packet and part.started.packet or nil)
    add_packet(item, f.complete_in, here, part.started.complete_in)
    return info
end

-- --- entry point ---------------------------------------------------------------------------------------------

-- Count the calls for a packet in this pass: a packet can contain several TLS records. Private data of a packet lives as
-- long as the pass.
local function count_call(pinfo)
    local before = tonumber(pinfo.private["zcp.calls"]) or 0
    pinfo.private["zcp.calls"] = tostring(before + 1)
    return before + 1
end

-- Add text to the Info column, which has all frames of the packet: each TLS record comes in its own call.
local function add_info(pinfo, text)
    local before = pinfo.private["zcp.info"]
    local line = before and before .. ", " .. text or text
    pinfo.private["zcp.info"] = line
    pinfo.cols.info = line
end

local http = Dissector.get("http")

-- HTTPS uses the same port. No frame begins with a letter: its length would be over a gigabyte.
local function is_http(pinfo, chunk)
    local key = key_of(ends_of(pinfo))
    local known = conversations[key]
    if not known and chunk:find("^%u%u%u") then
        known = { http = true }
        conversations[key] = known
    elseif known and known.http and begins_with_welcome(chunk) then
        conversations[key], known = nil, nil -- the port is used again
    end
    return known and known.http
end

function zcp.dissector(tvb, pinfo, tree)
    local chunk = tvb:raw()
    local count = count_call(pinfo)
    local of_packet = calls[pinfo.number] or {}
    calls[pinfo.number] = of_packet
    local found = of_packet[count]
    if not found or found.size ~= #chunk then
        found = is_http(pinfo, chunk) and { size = #chunk, http = true } or take(chunk, pinfo)
        of_packet[count] = found
    end
    if found.http then
        return http:call(tvb, pinfo, tree)
    end
    pinfo.cols.protocol = "ZCP"
    local infos = {}
    for index, part in ipairs(found) do
        part.packet = pinfo.number
        local info = show_part(part, tvb, tree)
        if index <= MAX_INFO then
            infos[#infos + 1] = info
        elseif index == MAX_INFO + 1 then
            infos[#infos + 1] = "…"
        end
    end
    add_info(pinfo, table.concat(infos, ", "))
    return #chunk
end

-- --- registration --------------------------------------------------------------------------------------------

DissectorTable.get("tls.alpn"):add("zcp/1", zcp)
DissectorTable.get("tcp.port"):add_for_decode_as(zcp) -- for traffic that was decrypted elsewhere

local tls_ports, port = DissectorTable.get("tls.port"), 0

local function listen_on(wanted)
    if port ~= 0 then
        tls_ports:remove(port, zcp)
    end
    port = wanted
    if port ~= 0 then
        tls_ports:add(port, zcp)
    end
end

function zcp.prefs_changed()
    if zcp.prefs.port ~= port then
        listen_on(zcp.prefs.port)
    end
end

listen_on(zcp.prefs.port)
