
"use strict";

// Fetches /status.json once a second with the token that the user typed in, and shows the figures.
// The token is only in a variable of this script. Everything shown is inserted as text, never as markup.
(() => {
  const EVERY_MS = 1000;
  const TIMEOUT_MS = 10000;
  const MAX_RETRY_MS = 10000; // between two attempts, if the server does not answer
  const SHORTEST_MS = 60000, WINDOW_MS = 300000; // the time range of a chart
  const GAP_MS = 5000; // a longer gap without figures breaks the line of a chart
  const MAX_POINTS = 400;
  const MAX_ALERTS = 20;
  const DAY_MS = 86400000;
  const TOKEN = /^[A-Za-z0-9_-]{43}$/;
  const SVG = "http://www.w3.org/2000/svg";
  const CHART_WIDTH = 300, CHART_HEIGHT = 50;

  const at = (id) => document.getElementById(id);
  let token = null;
  let wasGood = false; // this token has been accepted
  let paused = false;
  let timer = 0;
  let pending = null; // the AbortController of the request in flight
  let failures = 0;
  let lastSeen = null; // when the last figures arrived, by this machine's clock
  let before = null; // the previous figures
  let points = [];

  // --- numbers as text -------------------------------------------------------------------------------

  const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
  const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
  const day = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });

  const count = (value) => (value >= 1e6 ? short : whole).format(value);
  const rate = (value) => (value < 10 && !Number.isInteger(value) ? value.toFixed(1) : count(value));
  const plural = (value, one, many) => `${count(value)} ${value === 1 ? one : many}`;

  function words(name) {
    const text = name.replace(".", ": ").replaceAll("_", " ").replace(/\b(tls|http)\b/g, (word) => word.toUpperCase());
    return text[0].toUpperCase() + text.slice(1);
  }

  function latency(seconds) {
    if (seconds === null) return "–";
    if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
    if (seconds < 1) return `${(seconds * 1000).toPrecision(3)} ms`;
    return `${seconds.toPrecision(3)} s`;
  }

  function span(seconds) {
    const days = Math.floor(seconds / 86400), hours = Math.floor(seconds / 3600) % 24;
    const minutes = Math.floor(seconds / 60) % 60;
    if (days) return `${plural(days, "day", "days")} ${hours} h`;
    if (hours) return `${hours} h ${minutes} min`;
    return minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
  }

  function bytes(value) {
    return value < 1e9 ? `${Math.round(value / 1e6)} MB` : `${(value / 1e9).toFixed(2)} GB`;
  }

  // --- the page --------------------------------------------------------------------------------------

  function put(node, text) {
    if (node.textContent !== text) node.textContent = text;
  }

  function tone(node, name) { // also in words elsewhere: never by colour alone
    for (const each of ["good", "warn", "bad"]) node.classList.toggle(each, each === name);
  }

  function make(name, className, parent) {
    const node = document.createElement(name);
    if (className) node.className = className;
    parent.append(node);
    return node;
  }

  // Reuse rows and change only their texts: nothing jumps, and a selection survives.
  function rows(body, wanted) {
    while (body.rows.length > wanted.length) body.deleteRow(-1);
    while (body.rows.length < wanted.length) {
      const row = body.insertRow();
      make("th", "", row).scope = "row";
      make("span", "", row.cells[0]);
    }
    wanted.forEach(({ label, values, mood, part, good, small }, index) => {
      const cells = body.rows[index].cells;
      put(cells[0].firstChild, label);
      extra(cells[0], small, part, good);
      while (cells.length <= values.length) body.rows[index].insertCell();
      values.forEach((value, column) => {
        put(cells[column + 1], value);
        tone(cells[column + 1], mood);
      });
    });
  }

  function extra(cell, small, part, good) {
    if (small !== undefined) {
      put(cell.querySelector(".small") ?? make("div", "small", cell), small);
    }
    if (part === undefined) return;
    let bar = cell.querySelector("svg");
    if (bar === null) {
      bar = draw("svg", { class: "bar", viewBox: "0 0 100 1", preserveAspectRatio: "none", "aria-hidden": "true" }, cell);
      draw("rect", { class: "ground", width: "100", height: "1" }, bar);
      draw("rect", { height: "1" }, bar);
    }
    bar.lastChild.setAttribute("class", good ? "good" : "");
    bar.lastChild.setAttribute("width", String(part > 0 ? Math.max(0.5, part * 100) : 0));
  }

  function draw(name, attributes, parent) {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    parent.append(node);
    return node;
  }

  function report(fault) { // beside the field or below the figures, whichever is visible
    put(at("token-fault"), token === null ? fault : "");
    put(at("fault"), token === null ? "" : fault);
  }

  function state(name, mood) {
    put(at("state"), name);
    tone(at("state"), mood);
  }

  // --- charts ----------------------------------------------------------------------------------------

  const charts = [...document.querySelectorAll("svg.chart")].map((svg) => {
    const names = svg.dataset.lines.split(" ");
    svg.setAttribute("viewBox", `0 0 ${CHART_WIDTH} ${CHART_HEIGHT}`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    draw("path", { class: "rest", d: `M0 ${CHART_HEIGHT - 0.5}H${CHART_WIDTH}` }, svg);
    const area = names.length === 1 ? draw("path", { class: "area" }, svg) : null;
    const lines = ["first", "second"].slice(0, names.length).map((name) => draw("path", { class: name }, svg));
    const top = document.createElement("div");
    top.className = "top";
    top.setAttribute("aria-hidden", "true"); // the label of the chart has the same text
    svg.before(top);
    const peak = make("span", "", top), since = make("span", "", top);
    return { svg, names, area, lines, peak, since, asText: svg.dataset.unit === "s" ? latency : rate };
  });

  function chart({ svg, names, area, lines, peak, since, asText }, now) {
    const known = points.flatMap((point) => names.map((name) => point[name])).filter((value) => value !== null);
    const highest = known.length ? Math.max(...known) : 0;
    const shown = points.length ? Math.max(SHORTEST_MS, now - points[0].time) : SHORTEST_MS;
    const scale = highest > 0 ? (CHART_HEIGHT - 4) / highest : 0;
    names.forEach((name, index) => {
      let line = "", filled = "", last = null;
      for (const point of points) {
        if (point[name] === null) { last = null; continue; }
        const x = (CHART_WIDTH * (1 - (now - point.time) / shown)).toFixed(1);
        const y = (CHART_HEIGHT - 1 - point[name] * scale).toFixed(1);
        if (last === null || point.time - last.time > GAP_MS) {
          if (last !== null) filled += `V${CHART_HEIGHT}Z`;
          line += `M${x} ${y}`;
          filled += `M${x} ${CHART_HEIGHT}V${y}`;
        } else {
          line += `L${x} ${y}`;
          filled += `L${x} ${y}`;
        }
        last = { time: point.time };
      }
      lines[index].setAttribute("d", line);
      if (area !== null) area.setAttribute("d", last === null ? "" : `${filled}V${CHART_HEIGHT}Z`);
    });
    const text = known.length ? `peak ${asText(highest)}` : "no figures yet";
    const window = shown < 90000 ? `${Math.round(shown / 1000)} s` : `${Math.round(shown / 60000)} min`;
    put(peak, text);
    put(since, window);
    svg.setAttribute("aria-label", `Chart of the last ${window}: ${text}`);
  }

  // --- figures ---------------------------------------------------------------------------------------

  function show(figures) {
    const { connections, sessions, requests, traffic, handshakes } = figures;
    put(at("connections"), count(connections.tcp));
    put(at("connections-more"),
      `of ${count(connections.limit)}; ${count(connections.zcp)} ZCP, ${count(connections.http)} HTTP`);
    put(at("sessions"), count(sessions.live));
    put(at("sessions-more"), `${count(sessions.opened)} opened, ${count(sessions.revoked)} revoked`);
    put(at("requests"), rate(traffic.requests_per_s));
    put(at("requests-more"), `${rate(traffic.errors_per_s)} errors / s, ${count(requests.in_flight)} in flight`);
    put(at("handshakes"), rate(traffic.handshakes_per_s));
    put(at("handshakes-more"),
      `${rate(traffic.handshake_failures_per_s)} failed / s, ${count(handshakes.in_progress)} in progress`);

    const percentiles = (of) => [of.p50, of.p90, of.p99, of.p999].map(latency);
    rows(at("latency"), [
      { label: "CPU", values: percentiles(traffic.work), small: `${count(traffic.work.count)} sampled` },
      { label: "Await", values: percentiles(traffic.waits), small: plural(traffic.waits.count, "request", "requests") },
    ]);
    showHandshakes(handshakes);
    showStreams(figures.streams);
    showCertificates(figures.certificates);
    showStore(figures.store);
    showWorkers(figures.workers);
    showAlerts(figures.alerts, figures.time, figures.operator);
    showProcess(figures);

    if (figures.draining) state("Draining", "warn");
    else if (figures.ready && figures.alerts.open.some(({ severity }) => severity === "error" || severity === "critical"))
      state("Ready, with errors", "warn");
    else if (figures.ready) state("Ready", "good");
    else state("Not ready", "bad");
    put(at("summary"), `up ${span(figures.uptime_s)}, updated ${clock.format(lastSeen)}`);
    report(figures.reasons.join("; "));
    document.title = `${figures.ready ? "" : "! "}zcproto ${location.host}`;
  }

  function showHandshakes({ completed, failed }) {
    const causes = Object.entries(failed).sort((one, other) => other[1] - one[1]);
    const all = causes.reduce((sum, [, number]) => sum + number, completed) || 1;
    rows(at("results"), [
      { label: "Completed", values: [count(completed)], part: completed / all, good: true },
      ...causes.map(([cause, number]) => ({ label: words(cause), values: [count(number)], part: number / all })),
    ]);
  }

  function showStreams(streams) { // servers without any have nothing to show
    at("streams-card").hidden = !streams.opened;
    rows(at("streams"), [
      { label: "Open", values: [count(streams.open)] },
      { label: "Opened", values: [count(streams.opened)] },
      { label: "Cut", values: [count(streams.cut)] },
      { label: "Items sent", values: [count(streams.items_sent)], small: bytes(streams.bytes_sent) },
      { label: "Items received", values: [count(streams.items_received)], small: bytes(streams.bytes_received) },
    ]);
  }

  function showCertificates(certificates) {
    rows(at("certificates"), certificates.map((one) => {
      const names = one.more_names ? [...one.names, `${one.more_names} more`] : one.names;
      const left = one.seconds_left <= 0 ? "expired"
        : one.seconds_left < 86400 ? "under a day" : plural(one.days_left, "day", "days");
      const mood = one.days_left < 7 ? "bad" : one.days_left < 30 ? "warn" : "good";
      const word = { bad: one.seconds_left <= 0 ? "" : ", renew now", warn: ", expires soon", good: "" }[mood];
      return {
        label: one.file, small: [one.source, one.key_type, ...names].filter(Boolean).join(", "),
        values: [left + word], mood,
      };
    }));
  }

  function showStore(store) {
    const refusing = store.refusing ? ", refuses all tokens" : "";
    rows(at("store"), [
      { label: "State", values: [store.state + refusing], mood: store.state === "healthy" ? "good" : "bad" },
      { label: "Kind", values: [store.url] },
      ...["outages", "failures", "pending_revocations"].filter((name) => name in store)
        .map((name) => ({ label: words(name), values: [count(store[name])] })),
    ]);
  }

  function showWorkers(workers) { // a server of one process has no lines
    at("workers-card").hidden = !workers.length;
    const known = (value, asText) => value === null ? "–" : asText(value);
    rows(at("workers"), workers.map((one) => ({
      label: words(one.worker),
      small: [one.state, one.pid ? `pid ${one.pid}` : "", one.restarts ? plural(one.restarts, "restart", "restarts") : ""]
        .filter(Boolean).join(", "),
      values: [known(one.connections, count), known(one.requests_per_s, rate), known(one.loop_lag_s, latency),
        known(one.rss_bytes, bytes)],
      mood: one.rss_bytes === null ? "bad" : one.state === "serving" ? "" : "warn",
    })));
  }

  function showAlerts({ open, more_open: moreOpen, over, more_over: moreOver }, now, operator) {
    const shown = [...open, ...over].slice(0, MAX_ALERTS);
    const lines = shown.map((alert) => {
      const ended = alert.ended_at !== null;
      const often = alert.count > 1 ? `, ${count(alert.count)} times` : "";
      const when = (time) => (now - time < DAY_MS / 2 ? clock : day).format(time);
      return {
        mark: ended ? "closed" : alert.severity,
        mood: ended ? "" : alert.severity === "info" ? "" : alert.severity === "warning" ? "warn" : "bad",
        title: alert.title ?? words(alert.kind),
        small: ended ? `${when(alert.began_at)} to ${when(alert.ended_at)}${often}` : `since ${when(alert.began_at)}${often}`,
      };
    });
    const rest = open.length + over.length + moreOpen + moreOver - shown.length;
    if (rest) lines.push({ mark: "", title: `and ${count(rest)} more`, small: "" });
    if (!lines.length) lines.push({ mark: "", title: "None.", small: "" });
    at("alerts-note").hidden = operator || !shown.length;
    const list = at("alerts");
    while (list.children.length > lines.length) list.lastChild.remove();
    while (list.children.length < lines.length) {
      const item = make("li", "", list);
      make("span", "badge", item);
      make("span", "", item);
      make("div", "small", item);
    }
    lines.forEach(({ mark, mood, title, small }, index) => {
      const [badge, text, more] = list.children[index].children;
      badge.hidden = !mark;
      put(badge, mark);
      tone(badge, mood);
      put(text, mark ? ` ${title}` : title);
      put(more, small);
    });
  }

  function showProcess({ process, connections, requests, version, time, ...figures }) {
    const seconds = before === null ? 0 : (time - before.time) / 1000;
    const share = seconds > 0 ? (process.cpu_s - before.process.cpu_s) / seconds : null;
    const refused = Object.values(connections.refused).reduce((sum, number) => sum + number, 0);
    rows(at("process"), [
      { label: "CPU", values: [share === null || share < 0 ? "–" : `${(share * 100).toFixed(0)} % of a core`] },
      { label: "Memory", values: [bytes(process.rss_bytes)] },
      { label: "Requests since the start", values: [count(requests.total)] },
      { label: "Incidents", values: [count(requests.incidents)], mood: requests.incidents ? "bad" : "" },
      { label: "Connections refused", values: [count(refused)], mood: refused ? "warn" : "" },
      { label: "Up", values: [span(figures.uptime_s)] },
      { label: "Version", values: [version] },
    ]);
  }

  function remember({ time, connections, sessions, traffic }) {
    const last = points.at(-1);
    if (last !== undefined && time <= last.time) {
      if (time === last.time) return; // the server reads figures once a second for all viewers
      points = []; // its clock was set back
    }
    points.push({
      time, connections: connections.tcp, sessions: sessions.live, requests: traffic.requests_per_s,
      handshakes: traffic.handshakes_per_s, p50: traffic.work.p50, p99: traffic.work.p99,
    });
    points = points.filter((point) => point.time > time - WINDOW_MS).slice(-MAX_POINTS);
    for (const each of charts) chart(each, time);
  }

  // --- requests ---------------------------------------------------------------------------------------

  function schedule(milliseconds) {
    clearTimeout(timer);
    if (token !== null && !paused && !document.hidden) timer = setTimeout(fetchFigures, milliseconds);
  }

  function stop() {
    clearTimeout(timer);
    pending?.abort();
    pending = null;
  }

  async function fetchFigures() {
    if (pending !== null) return;
    const mine = pending = new AbortController();
    const timeout = setTimeout(() => mine.abort(), TIMEOUT_MS);
    let answer = null, text = "";
    try {
      answer = await fetch("/status.json", {
        headers: { Authorization: `Bearer ${token}` }, cache: "no-store", credentials: "omit",
        redirect: "error", signal: mine.signal,
      });
      text = await answer.text();
    } catch {
      answer = null; // reported below
    }
    clearTimeout(timeout);
    if (pending !== mine) return; // stopped meanwhile
    pending = null;
    if (answer === null) unanswered("No answer from the server.");
    else if (answer.status === 200) answered(text);
    else if (answer.status === 401) refused();
    else unanswered(`The server answered ${answer.status}: ${text.trim().slice(0, 200)}.`, answer.headers.get("Retry-After"));
  }

  function answered(text) {
    let figures;
    try {
      figures = JSON.parse(text);
      wasGood = true;
      failures = 0;
      lastSeen = Date.now();
      showFigures(true);
      show(figures);
      remember(figures);
      before = figures;
    } catch (error) {
      console.error(error);
      unanswered("The figures cannot be shown: server and page have different versions. Reload the page.");
      return;
    }
    schedule(EVERY_MS);
  }

  function unanswered(what, retryAfter = null) {
    failures += 1;
    const given = Number.parseInt(retryAfter ?? "", 10) * 1000;
    const wait = Math.min(MAX_RETRY_MS, Math.max(EVERY_MS * 2 ** Math.min(failures - 1, 4), given || 0));
    const last = lastSeen === null ? "" : ` The figures are from ${clock.format(lastSeen)}.`;
    state("No answer", "bad");
    at("figures").classList.add("stale");
    report(`${what} Retrying in ${wait / 1000} s.${last}`);
    schedule(wait);
  }

  function refused() {
    const had = wasGood;
    forget();
    report(had
      ? "The session has expired or was revoked. Open another one and enter its token."
      : "The server refused this token: it is unknown, expired, revoked, or bound to a device or an address.");
    at("token").setAttribute("aria-invalid", "true");
    at("token").focus();
  }

  function showFigures(wanted) {
    at("start").hidden = wanted;
    at("controls").hidden = !wanted;
    at("figures").hidden = !wanted;
    at("figures").classList.remove("stale");
  }

  function forget() {
    stop();
    token = before = lastSeen = null;
    wasGood = false;
    failures = 0;
    points = [];
    at("token").value = "";
    setPaused(false);
    showFigures(false);
    for (const body of document.querySelectorAll("#figures tbody, #alerts")) body.replaceChildren();
    for (const each of document.querySelectorAll(".big")) put(each, "–");
    for (const each of charts) chart(each, 0);
    state("Not connected", "");
    put(at("summary"), "");
    document.title = "zcproto";
  }

  function setPaused(wanted) {
    paused = wanted;
    put(at("pause"), paused ? "Resume" : "Pause");
    at("pause").setAttribute("aria-pressed", String(paused));
  }

  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const given = at("token").value.trim();
    const isToken = TOKEN.test(given);
    at("token").setAttribute("aria-invalid", String(!isToken));
    if (!isToken) {
      report(`A token is 43 letters, digits, - and _; this is ${plural(given.length, "character", "characters")}.`);
      at("token").focus();
      return;
    }
    at("token").value = "";
    token = given;
    report("");
    state("Connecting", "");
    fetchFigures();
  });
  at("pause").addEventListener("click", () => {
    setPaused(!paused);
    if (paused) {
      stop();
      state("Paused", "");
    } else {
      schedule(0);
    }
  });
  at("forget").addEventListener("click", () => {
    forget();
    report("");
    at("token").focus();
  });
  document.addEventListener("visibilitychange", () => (document.hidden ? stop() : schedule(0)));
  addEventListener("pagehide", () => { // leave nothing for the next user of this browser
    forget();
    report("");
  });

  put(at("host"), location.host);
  forget();
  at("ask").hidden = false;
})();
