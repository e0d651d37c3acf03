-- Scripts that change sessions, each of them atomic.
--
-- The first part is put before each of the scripts below it, which begin at `--@ name flags`. A script gets one
-- argument, a MessagePack array: prefix, node, clustered, shard, TAG (empty if the script is not for one user), then
-- its own arguments. It returns a MessagePack array: its result, commands that the client has to send, and the damaged
-- keys that it met.
--
-- A damaged session counts as missing, so that scripts for many sessions do not fail because of one. A damaged u:{TAG}
-- is rebuilt from x:{N}.
--
-- Keys, after the prefix. TAG stands for a user: all keys of one user are in one slot of a cluster.
--   s:{TAG}ID      a session, or its tombstone (an array, see KEPT below)
--   u:{TAG}        the stored sessions of a user in the order of opening: a sorted set of ids
--   r:{TAG}ID      the last refresh of a session, during its grace: spent refresh token, new access token (digests),
--                  when the grace ends, sealed pair
--   l:{TAG}ID      the leases of a session, a map: NODE to when its lease expires, and "" to when the last one that is
--                  not there any more was given up or expired
--   q:{TAG}        the requests of a user with an idempotency key: a hash, by the digest of the key
--   a:{TAG}DIGEST  the answer of such a request
--   c:{TAG}NODEID  written and deleted at once when a session changes: client tracking reports it to all processes,
--                  and NODE lets the process that made the change ignore it
--   i:ID           the TAG of a session
--   t:TOKEN        TAG and ID by the SHA-256 of the access token; "!" and a time once a refresh has replaced it
--   x:{N}          TAG and ID of all stored sessions by the time when both tokens have expired: a sorted set
--   m:{N}          tombstones by the time when they were added: TAG and ID of a session, or "t" and TOKEN
--   w:{N} o:{N}    place, TAG and DIGEST of running and of answered requests, by the time when they expire
--   b:{N}          bytes of answers
--   h:NODE         a process that has claimed requests, while it lives
--   e:{TOPIC}      a map: the epoch and the last number of a topic (zcproto/bus/valkey.py); and its channel
--   d:{TAG} g:{TAG} j:{TAG}ID k:{TAG}ID   the durable runs of a user (zcproto/bus/runs.lua)
--   y:PROCESS      a process with durable runs, while it lives
--   n              counts sessions and requests, to keep them in order
--   v:{N}          the version of this layout and a mark, which is missing if the server has lost its data
--
-- Keys without a TAG may be on other servers of a cluster. They only lead to a session or help to clean up, so a
-- wrong one does no harm. In a cluster a script does not touch them but returns commands for the client. All keys but
-- `n` and `v` have a time to live well beyond their use, so that an abandoned store empties itself.

local args = cmsgpack.unpack(ARGV[1])
local P, NODE, CLUSTERED, SHARD = args[1], args[2], args[3], '{' .. args[4] .. '}'
local tag = args[5]

local DAY, TAG_SIZE, CLOCK_SKEW = 86400000, 20, 10000
-- Sessions read, and ended, in one script, which blocks the server for about 2 ms.
local READ_AT_ONCE, AT_ONCE = 250, 100
local KEPT, TOKEN_EXPIRED, TOKEN_REVOKED, SESSION_REPLACED, UNAUTHENTICATED, UNAVAILABLE = 0, 68, 69, 70, 16, 14

-- A session: state, token, refresh, user, client, address, key, flags, created, last used, expires, refresh
-- expires, order. The state is KEPT, or the code of an ended session, followed by token and time only.
-- Times are decimal digits, because numbers in Lua cannot represent all of them.
local STATE, TOKEN, REFRESH, USER, CLIENT, ADDRESS = 1, 2, 3, 4, 5, 6
local LAST_USED, EXPIRES, REFRESH_EXPIRES, ORDER = 10, 11, 12, 13

local DAMAGED, NO_TOKEN = 'damaged', string.rep('\0', 32)

local far, damaged = {}, {}

local function answer(result)
  return cmsgpack.pack({result, far, damaged})
end

-- Run a command for a key. A key of another type is reported, and counts as missing.
local function try(command, key, ...)
  local reply = redis.pcall(command, key, ...)
  if type(reply) ~= 'table' or not reply.err then
    return reply
  elseif reply.err:sub(1, 9) ~= 'WRONGTYPE' then
    error(reply)
  end
  damaged[#damaged + 1] = key
  return false, DAMAGED
end

-- Run a command for keys without a TAG; in a cluster, return it for the client.
local function elsewhere(...)
  if CLUSTERED then
    far[#far + 1] = {...}
  else
    redis.call(...)
  end
end

local function before(a, b)
  return #a < #b or (#a == #b and a < b)
end

local function later(a, b)
  return before(a, b) and b or a
end

local function after(wall, ms)
  return string.format('%.0f', wall + ms)
end

-- Return the time by which answers and leases expire: that of the server, which all processes share. The client's own
-- is used if it may not read the server's, and in tests.
local function time(given)
  local wall, is_fixed = unpack(given)
  local now = redis.pcall('TIME')
  if is_fixed or now.err then
    return wall
  end
  return string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000))
end

-- Extend the time to live of a key.
local function linger(call, key, ms)
  call('PEXPIRE', key, ms, 'NX')
  call('PEXPIRE', key, ms, 'GT')
end

local function session_key(tag, id)
  return P .. 's:{' .. tag .. '}' .. id
end

local function lease_key(tag, id)
  return P .. 'l:{' .. tag .. '}' .. id
end

local function user_key(tag)
  return P .. 'u:{' .. tag .. '}'
end

local function tag_of(id)
  return try('GET', P .. 'i:' .. id)
end

local function split(member)
  return member:sub(1, TAG_SIZE), member:sub(TAG_SIZE + 1)
end

-- Return a session and its encoding; or nil, and DAMAGED if that is the reason.
local function read(tag, id)
  local key = session_key(tag, id)
  local raw, problem = try('GET', key)
  if not raw then
    return nil, problem
  end
  local ok, session = pcall(cmsgpack.unpack, raw)
  if ok and type(session) == 'table' and session[TOKEN] and (session[STATE] ~= KEPT or session[ORDER]) then
    return session, raw
  end
  damaged[#damaged + 1] = key
  return nil, DAMAGED
end

local function due(session)
  return later(session[EXPIRES], session[REFRESH_EXPIRES])
end

-- Return the leases of a session, or nil if they are unknown.
local function leases(tag, id)
  local ok, found = pcall(cmsgpack.unpack, try('GET', lease_key(tag, id)) or '')
  return ok and type(found) == 'table' and found or nil
end

-- Return whether it is known that no connection uses a session. With `counts_expired` a lease that has expired is as
-- good as one that was given up. A session that was used after its last lease is in use by a server of an earlier
-- version, which has no leases.
local function is_disconnected(tag, id, session, now, counts_expired)
  local found, last = leases(tag, id), '0'
  for node, until_ in pairs(found or {}) do
    if node ~= '' and (before(now, tostring(until_)) or not counts_expired) then
      return false
    end
    last = later(last, tostring(until_))
  end
  return found ~= nil and not before(after(last, CLOCK_SKEW), session[LAST_USED])
end

local function announce(tag, id)
  local key = P .. 'c:{' .. tag .. '}' .. NODE .. id
  redis.call('SET', key, '')
  redis.call('DEL', key)
end

-- Make a session a tombstone. The change is announced first: if a cluster that is moving keys interrupts the
-- script, other processes check the session again.
local function finish(tag, id, session, code, wall)
  local token = session[TOKEN]
  announce(tag, id)
  redis.call('SET', session_key(tag, id), cmsgpack.pack({code, token, wall}), 'PX', DAY)
  try('ZREM', user_key(tag), id)
  redis.call('DEL', lease_key(tag, id))
  elsewhere('ZREM', P .. 'x:' .. SHARD, tag .. id)
  elsewhere('ZADD', P .. 'm:' .. SHARD, wall, tag .. id)
  linger(elsewhere, P .. 'm:' .. SHARD, DAY)
  elsewhere('PEXPIRE', P .. 't:' .. token, DAY)
  elsewhere('PEXPIRE', P .. 'i:' .. id, DAY)
  return {id, token}
end

-- Make a damaged session a tombstone, because other processes may still have it in memory.
local function bury(tag, id, wall)
  finish(tag, id, {[TOKEN] = NO_TOKEN}, TOKEN_REVOKED, wall)
end

--@ create
-- Where one script would read or end too many sessions it returns 'many'. The client then reads them in steps, ends
-- those above AT_ONCE, and runs it again with the last ID of the index and the sessions to end. Unless a session was
-- opened since, which has a later place, ending them makes room.
local id, blob, ms, wall, per_user, evicts, idle_from, order, newest, ending = unpack(args, 6, 15)
local now, lease = time(args[16]), args[17]
local OLDEST, GIVEN_UP, EXPIRED_TOO = 1, 2, 3  -- what `evicts` may be, or 0
local LAPSED, LIVE, IN_USE = 1, 2, 3
local known = read(tag, id)
if known then
  return answer({known[STATE] == KEPT and 'again' or 'ended', {}})
end
local key, ended = user_key(tag), {}
local count, last = redis.call('ZCARD', key), redis.call('ZRANGE', key, -1, -1, 'WITHSCORES')

-- Return a session of this user, the code with which it ends to make room, and whether it is lapsed, live, or live and
-- may not end.
local function mate_of(id)
  local other, problem = read(tag, id)
  if problem == DAMAGED then
    bury(tag, id, wall)
  elseif not other or other[STATE] ~= KEPT then
    redis.call('ZREM', key, id)
  elseif before(wall, other[EXPIRES]) and (idle_from == '' or before(idle_from, other[LAST_USED])) then
    if evicts >= GIVEN_UP and is_disconnected(tag, id, other, now, evicts == EXPIRED_TOO) then
      return {id, other, TOKEN_EXPIRED, LIVE}
    end
    return {id, other, SESSION_REPLACED, evicts == OLDEST and LIVE or IN_USE}
  elseif before(wall, other[REFRESH_EXPIRES]) then
    return {id, other, TOKEN_EXPIRED, LAPSED}
  end
end

local mates, surplus = {}, 0
if count >= per_user and newest == last[1] then
  for _, chosen in ipairs(ending) do
    local mate = mate_of(chosen[2])
    if mate and mate[3] ~= chosen[1] then
      return answer({'many', {}})
    end
    mates[#mates + 1] = mate
  end
  surplus = #mates
elseif count > READ_AT_ONCE and count >= per_user then
  return answer({'many', {}})
elseif count >= per_user then
  local found = {[LAPSED] = mates, [LIVE] = {}, [IN_USE] = {}}
  for _, member in ipairs(redis.call('ZRANGE', key, 0, -1)) do
    local mate = mate_of(member)
    if mate then
      local list = found[mate[4]]
      list[#list + 1] = mate
    end
  end
  if #found[IN_USE] >= per_user then
    return answer({'full', {}})
  end
  for _, mate in ipairs(found[LIVE]) do
    mates[#mates + 1] = mate
  end
  surplus = #mates + #found[IN_USE] + 1 - per_user  -- more than one after the limit was lowered
  if surplus > AT_ONCE then
    return answer({'many', {}})
  end
end
for n = 1, surplus do
  local id, other, code = unpack(mates[n])
  ended[n] = {code, finish(tag, id, other, code, wall)}
end
local session = cmsgpack.unpack(blob)
if CLUSTERED then  -- the client has written these keys
  order = math.max(order, tonumber(last[2] or 0) + 1)
else
  order = redis.call('INCR', P .. 'n')
  redis.call('SET', P .. 't:' .. session[TOKEN], tag .. id, 'PX', ms)
  redis.call('SET', P .. 'i:' .. id, tag, 'PX', ms)
  redis.call('ZADD', P .. 'x:' .. SHARD, due(session), tag .. id)
  linger(redis.call, P .. 'x:' .. SHARD, ms)
end
session[ORDER] = order
redis.call('SET', session_key(tag, id), cmsgpack.pack(session), 'PX', ms)
redis.call('SET', lease_key(tag, id), cmsgpack.pack({[NODE] = after(now, lease)}), 'PX', ms)
redis.call('ZADD', user_key(tag), order, id)
linger(redis.call, user_key(tag), ms)
return answer({'created', ended})

--@ lease allow-oom
-- Arguments: IDs, in a cluster with the TAG before each, whether this process uses each of them, time, duration.
local now = time(args[8])
for n, member in ipairs(args[6]) do
  local tag, id
  if CLUSTERED then
    tag, id = split(member)
  else
    tag, id = tag_of(member), member
  end
  local left = tag and redis.call('PTTL', session_key(tag, id)) or 0
  if left > 0 then
    local kept, last = {}, '0'
    for node, until_ in pairs(leases(tag, id) or {}) do
      if node == '' or not before(now, tostring(until_)) then
        last = later(last, tostring(until_))
      elseif node ~= NODE then
        kept[node] = until_
      end
    end
    if args[7][n] then
      kept[NODE] = after(now, args[9])
    else
      last = now
    end
    kept[''] = last
    redis.call('SET', lease_key(tag, id), cmsgpack.pack(kept), 'PX', left)
  end
end
return answer(0)

--@ disconnected no-writes
-- Return which of a user's sessions with these IDs no connection uses.
local now, found = time(args[7]), {}
for _, id in ipairs(args[6]) do
  local session = read(tag, id)
  if session and session[STATE] == KEPT and is_disconnected(tag, id, session, now, args[8]) then
    found[#found + 1] = id
  end
end
return answer(found)

--@ rotate
local id, spent, token, refresh, expires, client, address, wall, sealed, grace, grace_ends = unpack(args, 6, 16)
if not CLUSTERED then
  tag = tag_of(id)
end
local session = tag and read(tag, id)
if not session then
  return answer({UNAUTHENTICATED, false})
elseif session[STATE] ~= KEPT then
  return answer({session[STATE], false})
elseif session[TOKEN] == token and session[REFRESH] == refresh then
  return answer({0, cmsgpack.pack(session)})
elseif not before(wall, due(session)) then
  return answer({TOKEN_EXPIRED, false})
elseif session[REFRESH] ~= spent then
  local last = redis.call('GET', P .. 'r:{' .. tag .. '}' .. id)
  if last and session[CLIENT] == client and session[ADDRESS] == address then
    local last_spent, last_token, ends, last_sealed = unpack(cmsgpack.unpack(last))
    if last_spent == spent and last_token == session[TOKEN] and before(wall, ends) then
      return answer({UNAVAILABLE, {cmsgpack.pack(session), last_sealed}})
    end
  end
  finish(tag, id, session, TOKEN_REVOKED, wall)
  return answer({TOKEN_REVOKED, true})
elseif not before(wall, session[REFRESH_EXPIRES]) then
  return answer({TOKEN_EXPIRED, false})
end
local old, old_due, ms = session[TOKEN], due(session), redis.call('PTTL', session_key(tag, id))
session[TOKEN], session[REFRESH] = token, refresh
session[CLIENT], session[ADDRESS] = client, address
session[LAST_USED], session[EXPIRES] = wall, expires
if before(session[REFRESH_EXPIRES], expires) then
  session[EXPIRES] = session[REFRESH_EXPIRES]
end
announce(tag, id)
redis.call('SET', session_key(tag, id), cmsgpack.pack(session), 'KEEPTTL')
if grace > 0 then
  local last = cmsgpack.pack({spent, token, grace_ends, sealed})
  redis.call('SET', P .. 'r:{' .. tag .. '}' .. id, last, 'PX', grace)
end
if not CLUSTERED then  -- in a cluster the client has written it
  redis.call('SET', P .. 't:' .. token, tag .. id, 'PX', math.max(ms, 1))
end
if due(session) ~= old_due then
  elsewhere('ZADD', P .. 'x:' .. SHARD, 'XX', due(session), tag .. id)
end
elsewhere('SET', P .. 't:' .. old, '!' .. wall, 'PX', DAY)
elsewhere('ZADD', P .. 'm:' .. SHARD, wall, 't' .. old)
linger(elsewhere, P .. 'm:' .. SHARD, DAY)
return answer({0, cmsgpack.pack(session)})

--@ find no-writes
local token = args[6]
local pointer = try('GET', P .. 't:' .. token)
if not pointer or pointer:sub(1, 1) == '!' then
  return answer({pointer, false})
end
local session, raw = read(split(pointer))
return answer({pointer, session and raw or false})

--@ read no-writes
-- Return sessions by TAG and ID, or by ID alone.
local found = {}
for _, member in ipairs(args[6]) do
  local tag, id
  if #member > TAG_SIZE + 2 then
    tag, id = split(member)
  else
    tag, id = tag_of(member), member
  end
  if tag then
    local session, raw = read(tag, id)
    if session then
      found[#found + 1] = {id, raw}
    end
  end
end
return answer(found)

--@ user no-writes
-- Return sessions of a user, the last ID, and where to continue.
local found, range = {}, {args[6], '+inf', 'BYSCORE', 'LIMIT', 0, READ_AT_ONCE, 'WITHSCORES'}
local members = redis.call('ZRANGE', user_key(tag), unpack(range))
for n = 1, #members, 2 do
  local session, raw = read(tag, members[n])
  if session then
    found[#found + 1] = {members[n], raw}
  end
end
local more = #members == 2 * READ_AT_ONCE and '(' .. members[#members]
return answer({found, members[#members - 1] or '', more or ''})

--@ index
-- Write the index of a user again, of the sessions with these IDs, if its key has another type.
local key = user_key(tag)
local kind = redis.call('TYPE', key).ok
if kind == 'zset' or kind == 'none' then
  return answer(0)
end
redis.call('DEL', key)
for _, id in ipairs(args[6]) do
  local session = read(tag, id)
  if session and session[STATE] == KEPT then
    redis.call('ZADD', key, session[ORDER], id)
    linger(redis.call, key, redis.call('PTTL', session_key(tag, id)))
  end
end
return answer(1)

--@ members no-writes
-- Return a range of a sorted set as one string, which clients parse faster.
return answer(table.concat(redis.call('ZRANGE', KEYS[1], args[6], args[7])))

--@ touch allow-oom
-- Arguments: IDs, in a cluster with the TAG before each, and times.
for n, member in ipairs(args[6]) do
  local tag, id
  if CLUSTERED then
    tag, id = split(member)
  else
    tag, id = tag_of(member), member
  end
  local session, used_at = tag and read(tag, id), args[7][n]
  if session and session[STATE] == KEPT and before(session[LAST_USED], used_at) then
    session[LAST_USED] = used_at
    redis.call('SET', session_key(tag, id), cmsgpack.pack(session), 'KEEPTTL')
  end
end
return answer(0)

--@ finish allow-oom
-- End the sessions with these IDs, or with these TAGs and IDs.
local code, wall, user, ended = args[7], args[8], args[9], {}
for _, member in ipairs(args[6]) do
  local tag, id
  if #member > TAG_SIZE + 2 then
    tag, id = split(member)
  else
    tag, id = tag_of(member), member
  end
  local session, problem
  if tag then
    session, problem = read(tag, id)
  end
  if problem == DAMAGED then
    bury(tag, id, wall)
  elseif session and session[STATE] == KEPT and (not user or user == session[USER]) then
    ended[#ended + 1] = finish(tag, id, session, code, wall)
  end
end
return answer(ended)

--@ finish_user allow-oom
-- End the oldest sessions of a user. Return them, and whether there may be more.
local code, wall, ended = args[6], args[7], {}
local ids = redis.call('ZRANGE', user_key(tag), 0, AT_ONCE - 1)
for _, id in ipairs(ids) do
  local session, problem = read(tag, id)
  if problem == DAMAGED then
    bury(tag, id, wall)
  elseif session and session[STATE] == KEPT then
    ended[#ended + 1] = finish(tag, id, session, code, wall)
  else
    redis.call('ZREM', user_key(tag), id)
  end
end
return answer({ended, #ids == AT_ONCE})

--@ expire allow-oom
-- Remove expired sessions of x and tombstones of m; in a cluster those in the arguments.
local wall, ended_before, limit, dues, tombstones = unpack(args, 6, 10)
local x, m, removed, past = P .. 'x:' .. SHARD, P .. 'm:' .. SHARD, 0, {}

local function forget(tag, id, session)
  redis.call('DEL', session_key(tag, id), lease_key(tag, id))
  if CLUSTERED then
    elsewhere('DEL', P .. 't:' .. session[TOKEN])
    elsewhere('DEL', P .. 'i:' .. id)
  else
    redis.call('DEL', P .. 't:' .. session[TOKEN], P .. 'i:' .. id)
  end
  removed = removed + 1
end

if not CLUSTERED then
  dues = redis.call('ZRANGEBYSCORE', x, '-inf', wall, 'LIMIT', 0, limit)
  tombstones = redis.call('ZRANGEBYSCORE', m, '-inf', ended_before, 'LIMIT', 0, limit - #dues)
end
for _, member in ipairs(dues) do
  local tag, id = split(member)
  local session, problem = read(tag, id)
  if problem == DAMAGED then
    redis.call('DEL', session_key(tag, id))
  end
  if session and session[STATE] == KEPT and before(wall, due(session)) then
    elsewhere('ZADD', x, due(session), member)
  else
    past[#past + 1] = member
    if session and session[STATE] == KEPT then
      redis.call('ZREM', user_key(tag), id)
      forget(tag, id, session)
    end
  end
end
if #past > 0 then
  elsewhere('ZREM', x, unpack(past))
end
for _, member in ipairs(tombstones) do
  if member:sub(1, 1) == 't' and #member == 33 then
    elsewhere('DEL', P .. 't:' .. member:sub(2))
    removed = removed + 1
  else
    local tag, id = split(member)
    local session = read(tag, id)
    if session and session[STATE] ~= KEPT then
      forget(tag, id, session)
    end
  end
end
if #tombstones > 0 then
  elsewhere('ZREM', m, unpack(tombstones))
end
return answer({#dues + #tombstones, removed})
