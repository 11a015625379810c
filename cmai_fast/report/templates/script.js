// Touch and mouse alike: the text of the mark under the pointer follows it.
const tip=document.getElementById('tip');
addEventListener('pointermove',e=>{const m=e.target.closest&&e.target.closest('[data-tip]');
if(!m){tip.style.opacity=0;return}
tip.textContent=m.dataset.tip;
tip.style.left=Math.max(4,Math.min(e.clientX+14,innerWidth-tip.offsetWidth-8))+'px';
tip.style.top=Math.max(4,e.clientY-tip.offsetHeight-12)+'px';tip.style.opacity=1});
